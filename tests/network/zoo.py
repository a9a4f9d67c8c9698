"""Architectures with batch norm of the transformers package, small, with random weights and statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers as t
from chains import chain_after
from torch import Tensor, nn
from zoo_images import IMAGES
from zoo_sequences import SEQUENCES

import batchnorm
from batchnorm.network.accelerate import norm_calls
from batchnorm.network.values.find import find_flow
from batchnorm.network.values.norms import is_frozen_lookalike

ZOO = IMAGES | SEQUENCES


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of the zoo, with statistics, gamma and beta that are not those of initialization.

    Parameters
    ----------
    name : str
        A key of ``ZOO``.

    Returns
    -------
    Module
        In eval mode.
    dict
        Arguments of its forward.
    """
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        tensors = {**module._parameters, **module._buffers}
        if "running_var" in tensors and tensors["running_var"] is not None:
            with torch.no_grad():
                tensors["running_mean"].normal_(0, 0.2, generator=generator)
                tensors["running_var"].uniform_(0.5, 1.5, generator=generator)
                if tensors.get("weight") is not None:
                    tensors["weight"].uniform_(0.5, 1.5, generator=generator)
                    tensors["bias"].normal_(0, 0.2, generator=generator)
    return model.eval(), inputs


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif hasattr(tree, "values"):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)


def answers(model: nn.Module, inputs: dict[str, Any], training: bool) -> dict[str, Tensor]:
    """Outputs, gradients and state after one pass with its backward, dropout drawn alike every time."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(2)
    outputs = [o for o in tensors(model(**inputs)) if o.is_floating_point()]
    sum(
        (o * torch.linspace(-1, 2, o.numel()).view_as(o).to(o)).sum() for o in outputs if o.requires_grad
    ).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"state {n}": v.clone() for n, v in model.state_dict().items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two answers, each tensor on the scale of its largest value.

    A gradient that is zero but for rounding (a bias in front of a norm) is seen on the scale of the others.
    """
    assert ours.keys() == theirs.keys()
    gradients = [
        float(v.double().abs().max()) for k, v in theirs.items() if k.startswith("gradient") and v.numel()
    ]
    floor, worst = 1e-3 * max(gradients, default=0.0), 0.0
    for name, expected in theirs.items():
        got = ours[name]
        assert got.shape == expected.shape, name
        if expected.numel():
            scale = max(float(expected.double().abs().max()), floor if name.startswith("gradient") else 1e-6)
            worst = max(worst, float((got.double() - expected.double()).abs().max()) / scale)
    return worst


def activations_after_norms(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How many activations stand behind a norm, or behind a sum with a norm's output, in a real run."""
    flow = find_flow(model, inputs)
    ours = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    chains = [chain_after(flow, norm) for norm in ours]
    return len(
        {(act.view, act.order) for chain in chains for *_, act in chain.calls[-1:] if chain.activation}
    )


def look(name: str) -> dict[str, Any]:
    """Put one network through accelerate and fold; figures for the table, and what the tests judge by."""
    model, inputs = build(name)
    reference = copy.deepcopy(model)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    wide = True
    try:
        copy.deepcopy(model).double()(**double)
    except RuntimeError:
        # some make float32 tensors in their forward
        wide, double = False, inputs
    exact, fast = (copy.deepcopy(model).double() if wide else copy.deepcopy(model) for _ in range(2))
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    frozen = [m for m in model.modules() if is_frozen_lookalike(m)]
    # our kernels compute, though the networks are so small that torch's would serve
    norm_calls.ALONE = norm_calls.JOINED = -1
    batchnorm.accelerate(fast)
    result: dict[str, Any] = {
        "wide": wide,
        "found": len(found),
        "frozen": len(frozen),
        "pairs": activations_after_norms(reference, inputs),
        "training": difference(answers(fast, double, True), answers(exact, double, True)),
        "eval": difference(answers(fast, double, False), answers(exact, double, False)),
    }
    # of the last mode, as the pairs are
    rows = batchnorm.record(fast)
    result["called"] = len(rows.of("called"))
    result["fused"] = sum(row.detail.rpartition(" -> ")[2] not in ("", "add") for row in rows.of("called"))
    result["sums"] = sum("add" in row.detail for row in rows.of("called"))
    result["unseen"] = [(row.path, row.reason) for row in rows.left_alone]
    folded = batchnorm.fold(reference.eval(), inputs)
    with torch.no_grad():
        outputs = [{str(i): o for i, o in enumerate(tensors(m.eval()(**inputs)))} for m in (folded, model)]
    result["fold"] = difference(*outputs)
    counts = batchnorm.record(folded).counts()
    result["folded"] = counts.get("folded", 0)
    result["left"] = [(row.path, row.reason) for row in batchnorm.record(folded).left_alone]
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page of the zoo."""
    lines = [
        "# The zoo",
        "",
        f"{len(results)} architectures with batch norm of the `transformers` package "
        f"({t.__version__}), made small, with random weights, running statistics, gamma and beta. "
        "Each went through `accelerate` and through `fold`, and was compared with itself as given.",
        "",
        "- **norms**: batch norms of `torch.nn` found; **+ n frozen**: lookalikes with four buffers, which `fold` "
        "folds and `accelerate` leaves, for Dynamo shows their arithmetic and no batch norm.",
        "- **pairs**: activations that, in a real run, stand behind a norm, or behind a sum with a norm's output; "
        "**in one call**: of these, called together with their norm after `accelerate`; **sums**: residual sums that "
        "are part of such a call.",
        "- **training**: largest difference of outputs, gradients and statistics between accelerated and given "
        "network in training mode, float64 (float32 where marked), each tensor on the scale of "
        "its largest value (a gradient not under a thousandth of the largest gradient). It is rounding: "
        "in a small network in training mode a few values per channel amplify it.",
        "- **folded**: norms folded; **eval**: largest difference of the folded network's outputs, float32, on "
        "the scale of the largest output.",
        "",
        "Made by `python tests/network/zoo.py docs/zoo.md`; `tests/network/test_zoo.py` holds every row.",
        "",
        "| architecture | norms | pairs | in one call | sums | training | folded | eval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = dict.fromkeys(("found", "frozen", "pairs", "fused", "sums", "folded"), 0)
    left = []
    for name, r in results.items():
        for key in total:
            total[key] += r[key]
        frozen = f" + {r['frozen']} frozen" if r["frozen"] else ""
        lines.append(
            f"| {name} | {r['found']}{frozen} | {r['pairs']} | {r['fused']} | {r['sums']} | {r['training']:.0e}"
            f"{'' if r['wide'] else ' (float32)'} "
            f"| {r['folded']} of {r['found'] + r['frozen']} | {r['fold']:.0e} |"
        )
        left += [(name, path, reason) for path, reason in r["left"]]
    lines += [
        f"| **all** | {total['found']} + {total['frozen']} frozen | {total['pairs']} | {total['fused']} "
        f"({total['fused'] / total['pairs']:.1%}) | {total['sums']} | | {total['folded']} of "
        f"{total['found'] + total['frozen']} ({total['folded'] / (total['found'] + total['frozen']):.1%}) | |",
        "",
        "Deformable DETR samples its features at places that it computes, which magnifies the rounding of float32; "
        "in float64 its folded network differs by 5e-13.",
        "",
        "## Run as they were written",
        "",
        "| architecture | norms | first reason |",
        "|---|---|---|",
        *(
            f"| {name} | {len(r['unseen'])} | {r['unseen'][0][1].replace('|', '/')} |"
            for name, r in results.items()
            if r["unseen"]
        ),
        "",
        "## Not folded, and why",
        "",
        "| architecture | norm | reason |",
        "|---|---|---|",
        *(f"| {name} | `{path}` | {reason} |" for name, path, reason in left),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys
    import warnings
    from pathlib import Path

    warnings.simplefilter("ignore")
    seen = {}
    for name in ZOO:
        seen[name] = look(name)
        print(name, {k: v for k, v in seen[name].items() if k not in ("left", "unseen")}, flush=True)
    Path(sys.argv[1]).write_text(table(seen))
