"""Runs the examples of docstrings."""

import doctest


def run_examples(documented, **names):
    """Runs all examples of a class or function, which may use these names; fails if there are none."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(documented, documented.__name__, globs=names)
    examples = [each for each in found if each.examples]
    assert examples, f"{documented.__name__} has no example"
    runner, output = doctest.DocTestRunner(), []
    for each in examples:
        runner.run(each, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)
