"""The error tree: one root, exit statuses, and messages that say what, got, expected, what to do."""

import inspect

import pytest
from latentrelay.runtime import errors

CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.LatentRelayError)
]


def test_the_tree_is_the_one_drawn_in_the_docstring() -> None:
    assert len(CLASSES) == 20
    for cls in CLASSES:
        assert cls.__name__ in (errors.__doc__ or "")
        assert cls.__doc__


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.LatentRelayError, 1),
        (errors.BundleTamperedError, 3),
        (errors.BundleLayoutError, 3),
        (errors.ManifestError, 3),
        (errors.HandoffFormatError, 3),
        (errors.HandoffMismatchError, 3),
        (errors.NonFiniteError, 1),
        (errors.CloudUnavailableError, 1),
        (errors.CloudProtocolError, 1),
        (errors.CloudRefusedError, 3),
        (errors.CloudCertificateError, 3),
        (errors.MissingExtraError, 2),
        (errors.RequestError, 2),
        (errors.RunCancelledError, 1),
    ],
)
def test_exit_statuses(cls: type[errors.LatentRelayError], status: int) -> None:
    assert cls.exit_status == status


def test_a_message_has_four_parts() -> None:
    error = errors.RequestError("the split is out of range", got=9, expected="0 .. 4", do="Choose another.")
    assert str(error) == "the split is out of range: got 9, expected 0 .. 4. Choose another."
    assert str(errors.RequestError("plain")) == "plain"
    assert len(str(errors.RequestError("long", got="x" * 10_000))) < 300
    missing = errors.MissingExtraError("torch", "cloud", purpose="Serving")
    assert (
        str(missing)
        == "Serving needs the module 'torch', which is not installed. Run: pip install \"latentrelay[cloud]\""
    )
