"""What ``lorafx.compile`` puts around a model: the compiled call, generate, and the bank that follows the model."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorafx import adapted, parameter_layers, peft_arguments, peft_layers, peft_methods, root_forward, saved_layers
from lorafx.backend import GraphRecord, Options, compile_graph
from lorafx.bank import AdapterBank
from lorafx.diffusers_scale import scale_in, scaled, without_scale
from lorafx.errors import AdapterMismatchError, UnsupportedModelError
from lorafx.following import Follower
from lorafx.fused_hooks import FusedSites
from lorafx.fused_layers import Fusions
from lorafx.invocations import Prompt
from lorafx.logs import warn_once
from lorafx.peft_change import changing_peft
from lorafx.recompiles import MANY, advice
from lorafx.recomputing import check_not_recomputed
from lorafx.saved_layers import SavedHook
from lorafx.selection import Selection, names_in, normalize
from lorafx.sites import BatchRows, RefuseNames, SiteHook, check_one_place
from lorafx.weight_packing import WeightPacking

log = logging.getLogger("lorafx")

RECOMPILE_LIMIT = 64  # of one entry: generate's greedy, beam and static-cache calls already take 7 of Dynamo's 8


NOT_COPIED = ("follower", "_entries", "_making_entry", "_hooks", "_forced_eager", "_calls", "_packing", "graphs")


class Runtime:
    """Ties a model to its bank.

    model: what the user gave; root: the module whose call is compiled (the base model of a PeftModel)
    """

    def __init__(
        self, model: nn.Module, root: nn.Module, bank: AdapterBank, options: Options, dynamic: bool | None, eager: bool
    ) -> None:
        self.model, self.root, self.bank = model, root, bank
        self.options, self.dynamic, self.eager = options, dynamic, eager
        self.graphs: list[GraphRecord] = []
        self._retraced_at = 0  # how many graphs there were then
        self.retraces: list[str] = []  # why, each time the bank was packed anew
        self.unfused: dict[str, str] = {}  # PEFT's layers that stay as they are, and why
        self.peft: dict[str, Any] = {}  # PEFT's layers that are fused
        self.fused = FusedSites(self, Fusions())
        self.follower = Follower(self)
        self._begin()

    def _begin(self) -> None:
        """What can't be copied or pickled, and is made anew in a copy."""
        self._entries: dict[str, Callable[..., Any]] = {}  # by the name of what is compiled
        self._making_entry = threading.Lock()
        self._forced_eager = 0
        self._calls = 0
        self._packing = WeightPacking(self.root)
        self._hooks: list[Any] = []
        vars(self.root)["_compiled_call_impl"] = RootCall(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.graphs, self._retraced_at, self.follower = [], 0, Follower(self)
        self._begin()
        self._connect_bank()

    # ------------------------------------------------------------------------------------------ putting on

    def install(self) -> None:
        """Put hooks, the compiled call and ``lora`` on the model; on an error, nothing."""
        try:
            self._connect_bank()
            self._attach_sites()
            self._hooks.append(self.root.register_forward_pre_hook(RefuseNames(), with_kwargs=True))
            for module in {id(m): m for m in (self.model, self.root)}.values():
                vars(module)["lora"] = self.bank
                vars(module)["_lorafx_runtime"] = self
            if hasattr(type(self.root), "generate"):
                vars(self.root)["generate"] = Generate(self)
            root_forward.stand_before(self.root, self)
            peft_methods.guard(self.root, self.bank)
            peft_arguments.stand_before(self.model, self)
            tuner = peft_layers.tuner_of(self.model)
            if tuner is not None:
                vars(tuner)["_enable_peft_forward_hooks"] = peft_layers.ForwardHooks(self, tuner)
            self.follower.follow()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off again."""
        if self.bank._shelf is not None:
            self.bank._shelf.detach()
        for hook in self._hooks:
            hook.remove()
        for module in self.root.modules():
            self.drop_hooks(module)
            self.fused.drop(module)
        root_forward.step_aside(self.root)
        peft_arguments.step_aside(self.model)
        peft_layers.own_memory(self.peft)
        for layer in self.peft.values():
            adapted.release(layer)
        for wrapper in self.bank.saved.wrappers.values():
            saved_layers.release(wrapper)
        tuner = peft_layers.tuner_of(self.model)
        for module, names in (
            (self.model, ("lora", "_lorafx_runtime")),
            (self.root, ("lora", "_lorafx_runtime", "generate", "_compiled_call_impl", *peft_methods.GUARDED)),
            (tuner, ("_enable_peft_forward_hooks",)),
        ):
            for name in names if module is not None else ():
                vars(module).pop(name, None)

    def drop_hooks(self, module: nn.Module) -> None:
        parameter_layers.detach(module, self.bank)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, RefuseNames) or (
                    isinstance(hook, (SiteHook, SavedHook)) and hook.bank is self.bank
                ):
                    del hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def _connect_bank(self) -> None:
        self.bank._root = self.root
        self.bank._on_new_store = self._on_new_store
        self.bank._guard_use = self._guard_use
        self.bank._follow = self.follower.follow
        self.bank._changing_peft = partial(changing_peft, self.follower)

    def _attach_sites(self) -> None:
        """Hooks on plain layers, PEFT's layers adapted; each told its place in the bank."""
        have = {
            path: hook
            for path, module in self.root.named_modules()
            for hook in module._forward_hooks.values()
            if isinstance(hook, SiteHook) and hook.bank is self.bank
        }
        saved = self.bank.saved
        parts = self.fused.find()
        modules = dict(self.root.named_modules())
        standing = [path for path in self.bank.store.index if path in modules or path not in parts]
        parameters = [s.name for s in self.bank.store.sites if s.experts and s.name not in self.peft]
        standing = [path for path in standing if path not in parameters]
        new = [path for path in standing if path not in self.peft and path not in have]
        new += [path.rpartition(".")[0] for path in parameters]
        check_one_place(self.root, [*new, *(path for path in saved.paths if path not in saved.wrappers)])
        for path in standing:
            site = self.bank.store.index[path]
            if path in self.peft:
                adapted.adapt(self.peft[path], self.bank, site)
                continue
            if path not in have:
                have[path] = SiteHook(self.bank, site)
                module = self.root.get_submodule(path)
                self._hooks.append(module.register_forward_hook(have[path], with_kwargs=True))
            have[path].site = site
            have[path].dora = self.bank.store.dora is not None and path in self.bank.store.dora.sites
        parameter_layers.attach(self.root, self.bank, parameters)
        self._hooks += self.fused.attach()
        for path in have.keys() - self.bank.store.index.keys():  # the store that had them was given up
            self.drop_hooks(self.root.get_submodule(path))
        for place, path in enumerate(saved.paths):
            if path in saved.wrappers:
                saved_layers.adapt(saved.wrappers[path], self.bank, place)
                continue
            module = self.root.get_submodule(path)
            if not any(isinstance(h, SavedHook) and h.bank is self.bank for h in module._forward_hooks.values()):
                self._hooks.append(module.register_forward_hook(SavedHook(self.bank, place), with_kwargs=True))
        for layer in self.peft.values():
            if not any(isinstance(h, peft_layers.ContiguousStateDict) for h in layer._state_dict_hooks.values()):
                self._hooks.append(layer.register_state_dict_post_hook(peft_layers.ContiguousStateDict()))

    def _on_new_store(self, reason: str | None) -> None:
        """``reason`` says why the bank was packed anew; None: it was not, after all."""
        self._attach_sites()
        if reason is None:
            return
        reasons = [] if self.eager or not self._entries else [reason]
        if reasons:
            warn_once(f"lorafx: {reason}: the bank is packed anew, and the next call compiles once.")
        # in one step, and the last: what stops us before it leaves no trace in the report, nor costs one
        self._retraced_at, self._entries, self.retraces[:] = len(self.graphs), {}, [*self.retraces, *reasons]

    def _on_new_projections(self) -> None:
        self._attach_sites()
        self._entries = {}
        self.retraces.append("projections were fused or parted (fuse_qkv_projections before compiling saves that)")

    def _guard_use(self, selection: Selection) -> None:
        if self.follower.gone and names_in(selection):
            raise UnsupportedModelError(
                "PEFT has taken its layers off this model (unload, merge_and_unload), so no adapter can be chosen."
                " lorafx.uncompile(model), then compile what is left with adapters of its own."
            )
        self.bank.check_rows(selection)
        if self.unfused and names_in(selection):
            path, reason = next(iter(self.unfused.items()))
            raise UnsupportedModelError(
                f"model.lora.use can't choose for {len(self.unfused)} layer(s) that PEFT runs itself, such as {path}"
                f" ({reason}). Use PEFT's set_adapter on this model."
            )

    # ------------------------------------------------------------------------------------------ calling

    @contextmanager
    def selected(
        self,
        names: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        prompt: Prompt | None = None,
        *,
        generating: bool = False,
    ) -> Iterator[None]:
        """One call with ``adapter_names`` of its own; ``prompt``: where aLoRA adapters begin in it; ``generating``: a
        call of many forwards.

        AdapterMismatchError: an unknown name, or not one name for each row
        """
        selection = normalize(names)
        self.follower.follow(selection)
        self._guard_use(selection)
        batch = self.batch_of(args, kwargs or {})
        peft_arguments.check_count(names, batch)
        with self.bank.calling(selection, batch, prompt), self.bank.held(selection) if generating else nullcontext():
            yield

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Calls inside run without what was compiled."""
        self._forced_eager += 1
        try:
            yield
        finally:
            self._forced_eager -= 1

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
        with ExitStack() as stack:
            if names is None:
                self.follower.follow(())
            else:
                stack.enter_context(self.selected(names, args, kwargs))
            batch = self.batch_of(args, kwargs)
            own = names is not None or offsets is not None or self.bank.needs_prompt
            stack.enter_context(self.bank.calling(None, batch, self.prompt(args, kwargs, offsets) if own else None))
            scale = scale_in(self.root, kwargs)
            if scale is not None and not self.unfused and self.follower.agrees():
                kwargs = without_scale(kwargs)
                if scale != 1.0:
                    chosen = scaled(self.bank.in_use, scale)
                    self._guard_use(chosen)
                    stack.enter_context(self.bank.calling(chosen, batch))
            elif scale not in (None, 1.0):  # layers of PEFT's, which diffusers itself has to scale
                stack.enter_context(self.eagerly())
            stack.enter_context(self.bank.forward())
            self._check_rows()
            self._calls += 1
            return self.entry()(*args, **kwargs)

    def prompt(self, args: Sequence[Any], kwargs: dict[str, Any], offsets: Any = None) -> Prompt | None:
        """Where aLoRA adapters begin in a call with these arguments; None where there is no such adapter.

        AdapterMismatchError: ``offsets`` (PEFT's ``alora_offsets``) are not one for each row
        """
        if not self.bank.store.late:
            return None
        return Prompt.of_call(args, kwargs, offsets, self.batch_of(args, kwargs))

    @torch.compiler.disable
    def is_running(self) -> bool:
        """Whether we are inside a call of the root; also once this model is not compiled by us any more."""
        state = self.bank._call.get()
        return (state is not None and state.pinned is not None) or runtime_of(self.root) is not self

    def entry(self) -> Callable[..., Any]:
        """What runs the root: its own call, compiled unless something rules that out."""
        packed = self._packing.done()  # in eager calls too: of two threads' layers that pack themselves, one fails
        if self.eager or self._forced_eager or not self.follower.agrees() or self._needs_eager() or not packed:
            late = self.bank.late_in_use and not self._forced_eager  # else PEFT's own hooks say where they begin
            if torch.is_grad_enabled() and (late or self.bank.chosen_by_call):
                check_not_recomputed(self.root, late)
            return self.root._call_impl
        if torch.is_grad_enabled() and self.bank.chosen_by_call and any(s.experts for s in self.bank.store.sites):
            check_not_recomputed(self.root)  # a graph hands their routing to no second forward
        call = root_forward.shortest_call(self.root)
        with self._making_entry:  # threads that come first together share one
            if call.__name__ not in self._entries:
                self._entries[call.__name__] = compiled_entry(call, self._backend, self.dynamic)
            return self._entries[call.__name__]

    def _backend(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, self.options, self.bank, self._keep)

    def _keep(self, graph: GraphRecord) -> None:
        graph.call = self._calls
        self.graphs.append(graph)
        by_call: dict[int, Any] = {}  # layers that break the graph have many in one call, whatever its inputs are
        for kept in self.graphs[self._retraced_at :]:
            if kept.frame == graph.frame:
                by_call.setdefault(kept.call, kept.shapes)
        if len(by_call) == MANY:
            warn_once(advice(type(self.root).__name__, list(by_call.values())))

    def _needs_eager(self) -> bool:
        """A selection of ours over weights that are being trained: PEFT's modules have to run, row by row. Beside a
        fused layer they can't, which its hook says."""
        return (
            bool(self.peft)
            and torch.is_grad_enabled()
            and (self.bank.chosen is not None or self.fused.parts or self.bank.late_in_use)
            and (
                any(adapted.needs_gradients(layer) for layer in self.peft.values())
                or any(saved_layers.needs_gradients(wrapper) for wrapper in self.bank.saved.wrappers.values())
            )
        )

    def batch_of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
        """Rows of the batch: the leading size of the model's main input, else of the first tensor."""
        main = getattr(self.root, "main_input_name", None)
        named = (main, "inputs", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
        for value in chain(args[:1], map(kwargs.get, named), args[1:], kwargs.values()):
            if isinstance(value, Tensor) and value.dim() > 0:
                return BatchRows.of_call(value.shape[0], chain(args, kwargs.values()))
        return None

    def _check_rows(self) -> None:
        rows, batch = len(self.bank.in_use), self.bank.batch
        if rows > 1 and batch is not None and batch % rows:
            raise AdapterMismatchError(
                f"adapters are chosen for {rows} rows, the batch has {batch}; expected a multiple (generate repeats"
                " rows for beams). Call model.lora.use with one name, or one for each row."
            )


class RootCall:
    """``model(...)``: nn.Module calls this in place of its own call, as after ``model.compile()``."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.runtime.call(args, kwargs)


class Generate:
    """``model.generate`` with ``adapter_names``, on a model whose own generate does not know them, and with aLoRA,
    which begins where the prompt says (or PEFT's ``alora_offsets``) and stays on for tokens decoded behind a cache, one
    at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.__doc__ = type(runtime.root).generate.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.runtime.root).generate.__get__(self.runtime.root))

    def __call__(self, *args: Any, adapter_names: Any = None, alora_offsets: Any = None, **kwargs: Any) -> Any:
        runtime, root = self.runtime, self.runtime.root
        runtime.follower.follow(())  # which may find the first aLoRA
        own = adapter_names is not None or alora_offsets is not None or runtime.bank.needs_prompt
        prompt = runtime.prompt(args, kwargs, alora_offsets) if own else None
        if adapter_names is not None:
            context = runtime.selected(adapter_names, args, kwargs, prompt, generating=True)
        else:
            batch = runtime.batch_of(args, kwargs)
            context = runtime.bank.calling(None, batch, prompt) if prompt is not None else nullcontext()
        with context:
            return type(root).generate(root, *args, **kwargs)


def compiled_entry(call: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """``call``, compiled, with graphs and a limit of recompiles of its own, which no other model's share."""
    extra: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13
        extra = {"recompile_limit": RECOMPILE_LIMIT}
    return torch.compile(with_own_code(call), backend=backend, dynamic=dynamic, **extra)


def with_own_code(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with a code object of its own, by which Dynamo keeps its graphs.

    torch 2.13's ``isolate_recompiles`` would part them too, but which part is meant is one variable of the process
    there: of two threads that call the same model, one may look for its graph where there is none, and compile again.
    """
    function = getattr(call, "__func__", None)
    if not isinstance(function, FunctionType):
        return call
    twin = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__, twin.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(twin).update(vars(function))  # among them what switches Dynamo off for it
    return MethodType(twin, call.__self__)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime that ``lorafx.compile`` put on ``model``, or None."""
    return vars(model).get("_lorafx_runtime")
