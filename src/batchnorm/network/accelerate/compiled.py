"""What stands in the place of an accelerated model's call."""

from __future__ import annotations

import inspect
import time
import types
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import nn
from torch.fx import _symbolic_trace
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from batchnorm.compiling import MARK, compiling
from batchnorm.network.accelerate.methods import Methods
from batchnorm.network.accelerate.rows import TOOL, Graph, first_line, rows
from batchnorm.network.record import LEFT_ALONE, Row

_COUNTS_IN_PYTHON = (
    "momentum=None: torch's forward reads the count of batches as a number of Python; "
    'convert(model, "batchnorm") averages in the graph'
)

_LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Accelerated:
    """A model's call: compiled, or plain where somebody else is to see the model.

    Parameters
    ----------
    model : Module
        Whose call it is.
    compiled : Compiled
        What runs it; shared by models that look alike.
    """

    def __init__(self, model: nn.Module, compiled: Compiled) -> None:
        self.model, self.compiled = model, compiled
        self.given_up = ""
        compiled.models.add(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.given_up and (self.compiled.hastened or _computes_later(self.model.forward)):
            self.given_up = (
                "its forward computes as it is asked (it is, or returns, a generator or coroutine), where Dynamo "
                "computes all of it at once: accelerate its parts"
            )
        if self.given_up or stands_aside():
            return self.model._call_impl(*args, **kwargs)
        compiled = self.compiled
        if compiled.full or compiled.methods.changed():
            fresh = Compiled(compiled.name) if compiled.full else compiled_for(self.model)
            self.compiled = compiled = fresh
            compiled.models.add(self.model)
        seen, began = compiled.events, time.perf_counter()
        try:
            result = compiled.run(self.model, *args, **kwargs)
            if compiled.events != seen and _holds_iterator(result):
                compiled.hastened = True
                warnings.warn(
                    f"accelerate: {compiled.name} returns a generator, and in this call Dynamo computed all of it at "
                    "once. From now on it runs as plain torch: accelerate its parts.",
                    stacklevel=2,
                )
            return result
        except torch._dynamo.exc.TorchDynamoException as error:
            if not compiled.is_of_whole_call(error):
                # a part has run, and must not run again
                raise error.__cause__ or error from None
            failure = error
        finally:
            if compiled.events != seen:
                compiled.settle(time.perf_counter() - began)
        # what is wrong with the call, the plain model says in its own words
        result = self.model._call_impl(*args, **kwargs)
        self.given_up = f"Dynamo cannot follow it: {first_line(str(failure))}"
        warnings.warn(
            f"accelerate: {compiled.name} runs as plain torch from now on. {self.given_up}", stacklevel=2
        )
        return result

    def rows(self) -> list[Row]:
        """What the compiler told so far, for a record."""
        told = rows(self.compiled.graphs, self.compiled.recompiled, self.compiled.seconds)
        if self.given_up:
            told.append(Row("", type(self.model).__name__, LEFT_ALONE, "", self.given_up, TOOL))
        told += [
            Row(path, type(m).__name__, "broke the graph", "in training", _COUNTS_IN_PYTHON, TOOL)
            for path, m in self.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
            and type(m).forward is nn.modules.batchnorm._BatchNorm.forward
            and (m.momentum is None and m.track_running_stats)
        ]
        return told

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model is the plain one

    def __reduce__(self) -> tuple[Any, ...]:
        return (_plain, ())


def _computes_later(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and bool(code.co_flags & _LATER)


def _holds_iterator(result: Any) -> bool:
    """Whether there is in an answer what Dynamo puts in a generator's place."""
    leaves = pytree.tree_leaves(result)
    leaves += pytree.tree_leaves(
        [vars(x) for x in leaves if not isinstance(x, torch.Tensor) and hasattr(x, "__dict__")]
    )
    return any(isinstance(leaf, (type(iter([])), type(iter(())))) for leaf in leaves)


def _plain() -> None:
    return None


def stands_aside() -> bool:
    """Whether a call is followed or transformed by somebody, who is to see the plain model."""
    return (
        compiling()
        or torch._C._get_tracing_state() is not None
        or _fx_traces()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch_module._has_any_global_hook()
    )


def _fx_traces() -> bool:
    # a flag of the process up to torch 2.13, one of each thread since; the public question warns
    by_thread = getattr(_symbolic_trace, "_is_fx_tracing_tls", None)
    if by_thread is None:
        return _symbolic_trace._is_fx_tracing_flag
    return getattr(by_thread, "flag", False)


_NUMBERS = count(1)


class Compiled:
    """The compiled call of all models that look alike, and what its compiler told.

    Parameters
    ----------
    name : str
        For profilers and messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._code_name = f"accelerated_{name}_{next(_NUMBERS)}"
        self.graphs: list[Graph] = []
        self.recompiled: list[str] = []
        self.seconds = 0.0
        self.events = 0
        self.full = False
        self.hastened = False
        self.methods = Methods()
        self.models: WeakSet[nn.Module] = WeakSet()
        self._failures: list[tuple[types.CodeType, str]] = []
        self.run = self._first

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        # Dynamo takes a second or more to import: not before it is needed
        self.run = self._compile()
        self.events += 1
        return self.run(*args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        from torch import _dynamo

        from batchnorm.network.accelerate.backend import compile_graph

        def batchnorm(module: Any, inputs: Any) -> Callable[..., Any]:
            run, graph = compile_graph(module, inputs, list(self.models))
            self.graphs.append(graph)
            self.methods.note(self.models)
            self.events += 1
            return run

        setattr(batchnorm, MARK, True)
        # a code of their own: Dynamo counts what it compiles by code object, and keeps by file, line and name which
        # sizes and settings changed from call to call, over all models of a process
        code = _call.__code__.replace(co_name=self._code_name)
        call = types.FunctionType(code, _call.__globals__)
        options: dict[str, Any] = {"guard_fail_fn": self._failed}
        if "isolate_recompiles" in inspect.signature(_dynamo.optimize).parameters:  # from torch 2.13 on
            options["isolate_recompiles"] = True
        context: Any = _dynamo.optimize(batchnorm, **options)
        context.callback = _guarding_hooks(context.callback)
        return context(call)

    def _failed(self, failure: Any) -> None:
        self._failures.append((failure.orig_code, failure.reason))
        self.events += 1

    def is_of_whole_call(self, error: Any) -> bool:
        """Whether Dynamo failed on the call as a whole, so that nothing has run, rather than on a part of it."""
        stack: Any = getattr(error, "real_stack", None)
        return bool(stack) and stack[0].name == self._code_name

    def settle(self, seconds: float) -> None:
        """Take note of what happened in a call that compiled, or would have.

        Parameters
        ----------
        seconds : float
            That it took.
        """
        self.seconds += seconds
        failures, self._failures = self._failures, []
        for code, reasons in _attempts(failures):
            limit = _limit_hit(code, len(reasons))
            if not limit:
                self.recompiled.append(reasons[-1])
                continue
            if len(self.models) > 1:
                self.full = True  # they do not compile alike: each gets one of its own
                continue
            name = f"torch._dynamo.config.{limit}"
            value = getattr(torch._dynamo.config, limit)
            warnings.warn(
                f"accelerate: {code.co_name} of {self.name} was compiled {len(reasons)} times, and changed "
                f"again: from now on what is new runs as plain torch. The limit is {name} = {value}; raise it by "
                f"assigning a larger number before the first call. What changed last: {reasons[-1]}",
                stacklevel=3,
            )
            self.recompiled.append(f"none any more, for {name} = {value} is reached")


def _guarding_hooks(compile_frame: Callable[..., Any]) -> Callable[..., Any]:
    """Let what is compiled look at hooks at each call; by default Dynamo looks when it compiles, and never again.

    The setting is read when guards are made, so it is changed there, and a call that compiles nothing pays nothing.
    """

    def compile_guarded(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return compile_frame(*args, **kwargs)

    # by which Dynamo tells what was compiled for whom
    compile_guarded._torchdynamo_orig_backend = compile_frame  # type: ignore[attr-defined]
    return compile_guarded


def _attempts(failures: list[tuple[types.CodeType, str]]) -> list[tuple[types.CodeType, list[str]]]:
    """Why what was compiled did not fit, for each time that something was to be compiled anew.

    Dynamo tells one failure for each of the compiled ones, by the number of their compilation.
    """
    attempts: list[tuple[types.CodeType, list[str]]] = []
    seen: set[tuple[types.CodeType, str]] = set()
    for code, reason in failures:
        number = (code, reason.partition(":")[0])
        if not attempts or attempts[-1][0] is not code or number in seen:
            attempts.append((code, []))
            seen.clear()
        seen.add(number)
        attempts[-1][1].append(_shortened(reason))
    return attempts


def _shortened(reason: str) -> str:
    """The guard that failed, without its number, its place in torch, and the stack."""
    return reason.splitlines()[0].split("  #")[0].partition(": ")[2].strip() or reason


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def _limit_hit(code: types.CodeType, failures: int) -> str:
    """Name of the limit that forbids compiling a code once more, where that many compiled ones did not fit."""
    config = torch._dynamo.config
    if failures >= config.recompile_limit:
        return "recompile_limit"
    total = getattr(torch._dynamo.eval_frame, "_get_total_cache_entry_count", lambda code: 0)
    return "accumulated_recompile_limit" if total(code) >= config.accumulated_recompile_limit else ""


_COMPILED: WeakValueDictionary[Any, Compiled] = WeakValueDictionary()


def compiled_for(model: nn.Module) -> Compiled:
    """Give the compiled call for a model: the same for all that look alike, so that they share what is compiled.

    Parameters
    ----------
    model : Module
        Looked at, not changed.

    Returns
    -------
    Compiled
        Dynamo's guards decide whether what it holds fits; looks decide no more than where it is kept.
    """
    key = _looks(model)
    found = _COMPILED.get(key)
    if found is None or found.full or found.methods.changed():
        found = _COMPILED[key] = Compiled(type(model).__name__)
    return found


def _looks(model: nn.Module) -> tuple[Any, ...]:
    plain = (bool, int, float, str, type(None))
    return tuple(
        (
            path,
            type(m),
            tuple(
                (k, v)
                for k, v in vars(m).items()
                if type(v) in plain and k not in ("training", "_is_full_backward_hook")
            ),
            tuple(
                (k, t if t is None else (tuple(t.shape), t.dtype, t.device))
                for table in (m._parameters, m._buffers)
                for k, t in table.items()
                if not torch.nn.parameter.is_lazy(t)
            ),
        )
        for path, m in model.named_modules(remove_duplicate=False)
    )
