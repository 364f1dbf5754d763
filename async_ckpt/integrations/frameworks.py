"""What integrations do alike: import their framework, refuse the settings that it decides, and put a word in."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from ..engine.config import EngineConfig
from ..errors import ConfigError


def require(extra: str, *modules: str) -> Any:
    """The first of these modules that can be imported. Raises ImportError: none can; names the extra to install."""
    failures = []
    for module in modules:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            failures.append(error)
    raise ImportError(
        f"the {extra} integration needs {modules[0].split('.')[0]}, which cannot be imported "
        f"({'; '.join(map(str, failures))}); install it with: pip install 'async-ckpt[{extra}]'"
    ) from failures[0]


def checked_config(config: Mapping[str, Any], decided: Mapping[str, str]) -> EngineConfig:
    """`config` as the engine will take it, but for the root; `decided` are the fields that are not the user's here, and
    who decides them. Raises ConfigError: a field that is unknown, wrong, or decided already."""
    own = [f"{name} ({decided[name]})" for name in config if name in decided]
    if own:
        raise ConfigError(f"these fields are not to be given, they are decided already: {', '.join(own)}")
    return EngineConfig.from_params({"root": ".", **config})


def wrapped(stock: Any, around: Callable[..., Any]) -> Any:
    """A function that calls ``around(stock, ...)``; `stock` itself where it is one already."""
    if hasattr(stock, "_is_async_ckpt"):
        return stock

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(stock, *args, **kwargs)

    wrapper._is_async_ckpt = True  # type: ignore[attr-defined]
    return wrapper
