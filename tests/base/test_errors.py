"""The tree of errors: what catches what."""

import pytest

from modelwright.base import errors


def test_every_error_hangs_below_the_root_and_is_documented():
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)]
    assert len(found) >= 8
    for cls in found:
        assert issubclass(cls, errors.ModelwrightError)
        assert cls.__doc__


@pytest.mark.parametrize(("cls", "builtin"), [(errors.ConfigError, ValueError), (errors.DataError, ValueError)])
def test_errors_about_values_are_value_errors_too(cls: type[Exception], builtin: type[Exception]):
    with pytest.raises(builtin):
        raise cls("x")


def test_a_missing_extra_names_the_package_and_the_command_that_installs_it():
    error = errors.MissingExtraError("fastapi", "serve", "The server")
    assert isinstance(error, ImportError)
    assert "fastapi" in str(error) and "pip install 'modelwright[serve]'" in str(error)


def test_a_request_error_carries_what_the_http_body_needs():
    error = errors.RequestError("no", code="invalid_value", param="top_p", status=422)
    assert (error.code, error.param, error.status) == ("invalid_value", "top_p", 422)
