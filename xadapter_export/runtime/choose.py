"""Which variant of an expert set answers on this machine: one rule, a pure function of what there is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from xadapter_export.bundle.machine import INT8_DOT_PRODUCTS, Machine
from xadapter_export.bundle.manifest import Deployment, Manifest, Variant
from xadapter_export.errors import BundleError, ConfigError, ParityError
from xadapter_export.targets import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    GPU_PROVIDERS,
    KINDS,
    PORTABLE,
    PRECISIONS,
    TARGETS,
    Kind,
    Target,
    all_targets,
    all_variants,
)

# Why fp32 is taken where int8 is not the best.
_NO_BETTER: Final[dict[Kind, str]] = {
    "x86-64 without AVX2": "int8 gains nothing on this CPU",
    "Arm without int8 dot products": "int8 gains nothing on this CPU",
    "any other CPU": "whether int8 is fast on this CPU is unknown",
}


@dataclass(frozen=True)
class Choice:
    """The variant that answers, and why in a few words; with ``engine``, its engines in its place.

    Attributes:
        named: Whether it was asked for by its whole name, so that nothing else will do.
    """

    variant: Variant
    reason: str
    engine: Deployment | None = None
    named: bool = False

    @property
    def name(self) -> str:
        """Name of what answers: ``cpu-int8``, ``tensorrt-rtx-fp16``."""
        return self.variant.name if self.engine is None else self.engine.name


def kind_of(machine: Machine) -> Kind:
    """Return the kind of CPU, as far as the order of variants depends on it."""
    has_dot_products = not machine.features.isdisjoint(INT8_DOT_PRODUCTS)
    if machine.architecture == "x86-64":
        if has_dot_products:
            return "x86-64 with VNNI"
        return "x86-64 with AVX2" if "avx2" in machine.features else "x86-64 without AVX2"
    if machine.architecture == "arm64":
        return "Arm with int8 dot products" if has_dot_products else "Arm without int8 dot products"
    return "any other CPU"


def order_of(kind: Kind) -> tuple[tuple[str, str], ...]:
    """Return what ``auto`` takes on a kind of CPU, the best first, each with the reason."""
    ranked = [
        (places[KINDS.index(kind)], f"{target.name}-{precision}", _reason(target, precision, kind))
        for target in all_targets()
        for precision, places in target.places.items()
    ]
    return tuple((name, reason) for _, name, reason in sorted(ranked))


def _reason(target: Target, precision: str, kind: Kind) -> str:
    """Return why a variant is taken: those before it in the order are not there."""
    if precision == "int8":
        return target.why.get(kind, "nothing else is there")
    return _NO_BETTER.get(kind, "no int8 variant suits this CPU")


def choices_by_kind(variants: Sequence[Variant]) -> dict[str, str]:
    """Return the variant that ``auto`` takes on each kind of CPU.

    Args:
        variants: The variants of one expert set.

    Returns:
        Names of variants by kind of CPU, or of every CPU where they are the same. A kind has a second line,
        with a runtime that not every machine has, where that changes the choice. Nothing where no CPU runs
        any of them.
    """
    there = {variant.name for variant in variants}
    found: dict[str, str] = {}
    for kind in KINDS:
        names = [name for name, _ in order_of(kind) if name in there]
        without = [name for name in names if _optional_module(name) is None]
        if without:
            found[kind] = without[0]
        if names and names[:1] != without[:1]:
            runtime = TARGETS[all_variants()[names[0]].target].runtime
            assert runtime is not None  # what has a rank is run
            found[f"{kind}, {runtime.name} installed"] = names[0]
    same = len(set(found.values())) == 1 and set(found) == set(KINDS)
    return {"every CPU": next(iter(found.values()))} if same else found


def choices_of(manifest: Manifest) -> dict[str, str]:
    """Return ``choices_by_kind`` of a bundle's default expert set."""
    return choices_by_kind(manifest.variants_of(manifest.default_expert_set))


def rank(variants: Sequence[Variant], *, providers: Sequence[str], machine: Machine) -> list[Choice]:
    """Return what ``auto`` may take of one expert set, the best first; see ``choose``."""
    by_name = {variant.name: variant for variant in variants}
    rules = _rules(providers, machine)
    return [Choice(by_name[name], reason) for name, reason in rules if name in by_name]


def choose(
    variants: Sequence[Variant],
    name: str,
    *,
    providers: Sequence[str],
    machine: Machine,
    engines: Sequence[Deployment] = (),
    refused: Collection[str] = (),
) -> Choice:
    """Choose among the variants of one expert set.

    ``auto`` takes, with a GPU provider, fp16 and else fp32: of the graphs for CUDA where that is the provider
    and they are there, else of the portable ones. On the CPU it takes the first of the order for its kind
    (``order_of``) that is there and whose runtime is installed. It never takes fp16 on a CPU, where fp16 is
    slower than fp32; int4, and engines, only by name.

    Args:
        variants: The variants of the set.
        name: ``auto``; a variant's whole name, ``cpu-int8``; a precision, ``int8``, which is the fastest
            target here that has it; or the name of engines, ``tensorrt-rtx-fp16``.
        providers: Names of the onnxruntime providers that were asked for.
        machine: The machine.
        engines: The deployments of the set that are engines.
        refused: Names of variants that gave wrong answers on this machine.

    Raises:
        BundleError: If the set has no such variant, or for ``auto`` none that suits.
        ConfigError: If the variant that is named cannot go with the providers.
        ParityError: If all that would do were refused.
    """
    by_name = {variant.name: variant for variant in variants}
    on_cpu = set(providers) <= {CPU_PROVIDER}
    if engine := next((made for made in engines if made.name == name), None):
        _check_no_provider(name, providers)
        return Choice(by_name[engine.source], "named", engine, named=True)
    if name == "auto":
        rules = _rules(providers, machine)
    elif name in PRECISIONS:
        rules = [
            (f"{target}-{name}", f"the fastest {name} here")
            for target in (_cpu_targets(name, machine) if on_cpu else _gpu_targets(providers))
        ]
    else:
        rules = [(name, "named")]
    found = [(wanted, reason) for wanted, reason in rules if wanted in by_name]
    _check_providers(name, providers)
    for wanted, reason in found:
        if wanted not in refused:
            return Choice(by_name[wanted], reason, named=reason == "named")
    if found:
        raise ParityError(
            "every suitable variant computes wrong outputs on this processor",
            where=f"{', '.join(wanted for wanted, _ in found)}, experts {variants[0].expert_set}, {machine}",
            hint="copy the bundle again, update onnxruntime, and please report this",
        )
    raise _not_there(variants, name, engines, on_cpu=on_cpu)


def _not_there(
    variants: Sequence[Variant], name: str, engines: Sequence[Deployment], *, on_cpu: bool
) -> BundleError:
    """Return the error of a set that has nothing that was asked for."""
    hint = "choose one of those, or export with its --precision and --target"
    if name == "auto":
        hint = f"name one of those with variant= (--variant), or export again with --variant {PORTABLE}"
        if on_cpu and all(variant.is_for_gpu for variant in variants):
            hint = (
                f"every variant of this bundle needs a GPU: export again with --variant {PORTABLE}, or run "
                f"it on a machine with a GPU (--provider {CUDA_PROVIDER})"
            )
    return BundleError(
        "the bundle has no suitable variant for this machine"
        if name == "auto"
        else "the bundle does not have this variant",
        where=f"{name}, experts {variants[0].expert_set}",
        expected=f"one of {', '.join([variant.name for variant in variants] + [e.name for e in engines])}",
        hint=hint,
    )


def _check_no_provider(name: str, providers: Sequence[str]) -> None:
    """Refuse a provider of onnxruntime for an engine.

    Raises:
        ConfigError: If there is one.
    """
    if set(providers) - {CPU_PROVIDER}:
        raise ConfigError(
            "an engine runs on the GPU without an onnxruntime execution provider",
            where=name,
            got=", ".join(providers),
            hint="remove the provider, or choose another variant",
        )


def _check_providers(name: str, providers: Sequence[str]) -> None:
    """Refuse a name that cannot go with the providers.

    Raises:
        ConfigError: If it is one.
    """
    target, precision = _parse(name)
    is_engine = target is not None and target.is_engine  # of which there is none, or it would be chosen
    if precision == "fp16" and not is_engine and not GPU_PROVIDERS & set(providers):
        raise ConfigError(
            "fp16 is slower than fp32 on a CPU, and no GPU provider was requested",
            where=name,
            hint="request one with providers= (--provider CUDAExecutionProvider), or choose fp32 or int8",
        )
    if target is None or target.provider is None:
        return
    if target.provider == CPU_PROVIDER and not set(providers) <= {CPU_PROVIDER}:
        raise ConfigError(
            "this variant runs only on the CPU, and another provider was requested",
            where=name,
            got=", ".join(providers),
            hint=f"remove the provider, or choose another variant, such as {PORTABLE}",
        )
    if target.provider not in providers and target.provider != CPU_PROVIDER:
        raise ConfigError(
            f"this variant needs {target.says}",
            where=name,
            got=", ".join(providers),
            hint=f"request it (--provider {target.provider}), or choose another variant",
        )


def runs_on_cpu(name: str) -> bool:
    """Whether what is named, ``auto`` included, can be had on a CPU."""
    target, precision = _parse(name)
    return precision != "fp16" and (target is None or target.runs_on_cpu)


def _parse(name: str) -> tuple[Target | None, str]:
    """Return the target that a name is of, if any, and the precision, or the name itself if it has none."""
    known = all_variants().get(name)
    return (None, name) if known is None else (TARGETS[known.target], known.precision)


def _optional_module(name: str) -> str | None:
    """Return what runs a variant and may not be installed; None where it is what every machine has."""
    runtime = TARGETS[all_variants()[name].target].runtime
    return runtime.module if runtime is not None and runtime.is_optional else None


def _rules(providers: Sequence[str], machine: Machine) -> list[tuple[str, str]]:
    """Return the names that ``auto`` may take, the best first, each with the reason."""
    if GPU_PROVIDERS & set(providers):
        reason = "a GPU provider was requested"
        precisions = ("fp16", "fp32")
        return [(f"{t}-{p}", reason) for t in _gpu_targets(providers) for p in precisions]
    if set(providers) - {CPU_PROVIDER}:
        return [(PORTABLE, "the portable graph runs on any provider")]
    return [
        (name, reason)
        for name, reason in order_of(kind_of(machine))
        if _optional_module(name) in (None, *machine.runtimes)
    ]


def _gpu_targets(providers: Sequence[str]) -> list[str]:
    """Return the targets for the first GPU provider, the fastest first: made for it, then for any."""
    first = next((name for name in providers if name in GPU_PROVIDERS), None)
    wanted = (first, None) if first is not None else (None,)
    graphs = [target for target in all_targets() if not target.is_deployment]
    return [target.name for provider in wanted for target in graphs if target.provider == provider]


def _cpu_targets(precision: str, machine: Machine) -> list[str]:
    """Return the targets for the CPU, the fastest first; one that is not installed says so when opened."""
    known = "fp32" if precision in ("fp32", "fp16") else "int8"
    names = [name for name, _ in order_of(kind_of(machine)) if all_variants()[name].precision == known]
    names.sort(key=lambda name: _optional_module(name) not in (None, *machine.runtimes))
    return [all_variants()[name].target for name in names]
