"""Units are found by listing packages; errors name what is allowed."""

import sys
import types

import pytest

from cellray.core import registry
from cellray.core.errors import ConfigError


def test_names_lists_modules_without_base():
    assert {"geneformer", "scgpt"} <= set(registry.names("cellray.models"))
    assert "base" not in registry.names("cellray.models")


def test_unknown_unit_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no 'scgtp' in models\. Did you mean 'scgpt'\?"):
        registry.find("cellray.models", "scgtp", "FAMILY")


def test_a_unit_from_elsewhere_is_found_by_dotted_name(monkeypatch):
    module = types.ModuleType("my_lab_mymodel")
    module.FAMILY = "mine"
    monkeypatch.setitem(sys.modules, "my_lab_mymodel", module)
    assert registry.find("cellray.models", "my_lab_mymodel:FAMILY", "FAMILY") == "mine"
    with pytest.raises(ConfigError, match="exports no 'OTHER'"):
        registry.find("cellray.models", "my_lab_mymodel:OTHER", "FAMILY")


def test_a_module_that_is_not_there():
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        registry.find("cellray.models", "no_such_module:FAMILY", "FAMILY")
