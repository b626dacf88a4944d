"""What a page of a report must not have."""

from html.parser import HTMLParser

NASTY = "<script>alert('x')</script> $x_1$ \u202e&amp;"


class Checker(HTMLParser):
    """Collects what a page must not have: tags that were opened and not closed, and anything that asks the network."""

    VOID = ("meta", "br", "link", "img", "use", "path", "rect", "circle")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker
