"""The errors' parents, by which callers tell where to look."""

import inspect

import pytest

from beam_pipeline import errors
from beam_pipeline.launch import execution

PARENTS = (errors.UsageError, errors.TrackingError, errors.ArtifactError, errors.DestinationError)
CLASSES = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if error not in (errors.PipelineError, errors.UnusualError, *PARENTS)
]


@pytest.mark.parametrize("error", CLASSES)
def test_each_error_has_one_of_the_four_parents(error):
    assert [parent for parent in PARENTS if issubclass(error, parent)] == [error.__mro__[-5]]


@pytest.mark.parametrize("error", CLASSES)
def test_each_error_is_known_by_its_name_in_the_text_that_beam_hands_over(error):
    found = execution.reason(
        RuntimeError(f"beam_pipeline.errors.{error.__name__}: the line [while running 'Read']"), ""
    )
    assert (type(found), str(found)) == (error, "the line")


def test_a_model_that_is_not_supported_is_told_from_none():
    assert not issubclass(errors.UnsupportedModelError, errors.NotAModelError)
    assert not issubclass(errors.NotAModelError, errors.UnsupportedModelError)
