"""Architectures with batch norm of the timm package, before and after accelerate: figures, and what is left alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.network.accelerate import norm_calls

# name of timm: side of the input, where 64 is too small or the network is made for one size
ARCHITECTURES = {
    "resnet18": 64, "resnet50": 64, "resnet10t": 64, "resnet26d": 64, "resnetblur18": 64, "skresnet18": 64,
    "legacy_seresnet18": 64, "resnest14d": 64, "gcresnext26ts": 64, "res2net50_26w_4s": 64, "cspresnet50": 64,
    "ecaresnet26t": 64, "mobilenetv2_050": 64, "mobilenetv3_small_050": 64, "mobilenetv4_conv_small_035": 64,
    "mnasnet_small": 64,
    "semnasnet_075": 64, "mobilenet_edgetpu_v2_xs": 64, "mobilenetv1_100": 64, "hardcorenas_a": 64, "fbnetc_100": 64,
    "spnasnet_100": 64, "lcnet_035": 64, "tinynet_e": 64, "mixnet_s": 64, "rexnet_100": 64, "ghostnet_050": 64,
    "ghostnetv2_100": 64, "repghostnet_050": 64, "mobileone_s0": 64, "repvgg_a0": 64, "repvit_m0_9": 64,
    "efficientnet_b0": 64, "efficientnet_es": 64, "tf_efficientnet_lite0": 64,
    "regnetx_002": 64, "regnety_002": 64, "densenet121": 64, "vgg11_bn": 64, "dla46_c": 64,
    "darknet17": 64, "cs3darknet_s": 64, "hrnet_w18_small": 64, "selecsls42": 64, "vovnet39a": 64,
    "ese_vovnet19b_dw": 64, "hgnetv2_b0": 64, "gernet_s": 64, "starnet_s1": 64, "inception_v3": 128,
    "levit_128s": 224, "levit_conv_128s": 224, "mobilevit_xxs": 128, "mobilevitv2_050": 128,
    "efficientvit_m0": 224, "efficientvit_b0": 64, "efficientformer_l1": 224, "efficientformerv2_s0": 224,
    "fastvit_t8": 64, "fasternet_t0": 64, "visformer_tiny": 224, "xcit_nano_12_p16_224": 224, "botnet26t_256": 256,
    "halonet26t": 256, "lambda_resnet26t": 64, "shvit_s1": 64,
    "tiny_vit_5m_224": 224, "swiftformer_xs": 224,
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and with statistics, gamma and beta that are not those of initialization."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10)
    with torch.no_grad():
        for norm in norms(model).values():
            if norm.running_mean is not None:
                norm.running_mean.normal_(0, 0.2)
                norm.running_var.uniform_(0.5, 1.5)
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.2)
    side = ARCHITECTURES[name]
    return model, torch.randn(4, 3, side, side)


def norms(model: nn.Module) -> dict[str, Any]:
    """Batch norms by path."""
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def look(name: str) -> dict[str, Any]:
    """Accelerate one network with an example: that compares it with the given one, in both modes.

    Raises
    ------
    VerificationError
        They differ.
    """
    # our kernels compute, though the maps are so small that torch's would serve
    norm_calls.ALONE = norm_calls.JOINED = -1
    torch._dynamo.reset()
    given, x = build(name)
    model = copy.deepcopy(given)
    before = {path: type(m) for path, m in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batchnorm.accelerate(model, x)
    assert {path: type(m) for path, m in model.named_modules()} == before
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in given.state_dict().items())
    seen: dict[str, Any] = {"norms": len(norms(model))}
    calls: set[str] = set()
    alone: dict[str, str] = {}
    for training in (True, False):
        model.train(training)(x)
        rows = batchnorm.record(model)
        calls |= {row.path for row in rows.of("called")}
        alone |= {row.path: row.reason for row in rows.left_alone}
    called = rows.of("called")
    seen["called"] = len(called)
    seen["activation"] = sum(row.detail.rpartition(" -> ")[2] not in ("", "add") for row in called)
    seen["add"] = sum("add" in row.detail for row in called)
    seen["single"] = {row.path: row.reason for row in called if not row.detail}
    seen["left"] = {path: reason for path, reason in alone.items() if path not in calls}
    seen["unseen"] = sorted(norms(model).keys() - calls - alone.keys())
    seen["breaks"] = [row.reason for row in rows.of("broke the graph")]
    seen["anew"] = [row.reason for row in rows.of("compiled anew")]
    seen["shared"] = len({id(m) for m in norms(model).values()})
    return seen


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of what `look` gave, by name."""
    import timm

    def total(key: str) -> int:
        return sum(r[key] for r in results.values())

    lines = [
        "# Architectures of timm, accelerated",
        "",
        f"{len(results)} architectures with batch norm of the `timm` package ({timm.__version__}), with random "
        "weights, running statistics, gamma and beta, 4 images each, float32. `accelerate(model, example)` compared "
        "each with itself as given, in training and in eval: outputs, gradients and statistics (see "
        "[accelerate](accelerate.md) for what is allowed). None was refused."
        + (
            f" Not run yet: {', '.join(rest)}."
            if (rest := [n for n in ARCHITECTURES if n not in results])
            else ""
        ),
        "",
        "- **norms**: batch norms of the network; **called**: of these, the ones that our operator runs; **with an "
        "activation**, **with a sum**: called as one with what follows; **breaks**: of the graph.",
        "",
        "Made by `python tests/network/accelerate/architectures.py docs/architectures.md`; "
        "`tests/network/accelerate/test_architectures.py` holds every row.",
        "",
        "| architecture | norms | called | with an activation | with a sum | breaks |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {r['norms']} | {r['called']} | {r['activation']} | {r['add']} | {len(r['breaks'])} |"
            for name, r in results.items()
        ),
        f"| **all** | {total('norms')} | {total('called')} | {total('activation')} | {total('add')} | |",
        "",
        "## Called alone, and why",
        "",
        "| reason | norms | architectures |",
        "|---|---|---|",
    ]
    alone: dict[str, dict[str, int]] = {}
    for name, r in results.items():
        for reason in r["single"].values():
            alone.setdefault(reason, {}).setdefault(name, 0)
            alone[reason][name] += 1
    for reason, names in sorted(alone.items(), key=lambda item: -sum(item[1].values())):
        lines.append(f"| {reason} | {sum(names.values())} | {', '.join(names)} |")
    left = [
        f"| {name} | `{path or '(the model)'}` | {reason} |"
        for name, r in results.items()
        for path, reason in (r["left"] | dict.fromkeys(r["unseen"], "its forward is not called")).items()
    ]
    breaks = [f"| {name} | {reason} |" for name, r in results.items() for reason in r["breaks"]]
    lines += ["", "## Not run by our operator, and why", ""]
    lines += ["| architecture | norm | reason |", "|---|---|---|", *left] if left else ["None."]
    lines += ["", "## Where the graph breaks", ""]
    lines += ["| architecture | reason |", "|---|---|", *breaks] if breaks else ["Nowhere."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import json
    import sys
    import time
    from pathlib import Path

    # python architectures.py PAGE [FIRST LAST]: in pieces, each kept beside the page
    page, kept = Path(sys.argv[1]), Path(sys.argv[1]).with_suffix(".json")
    chosen = (
        list(ARCHITECTURES)[slice(*map(int, sys.argv[2:4]))] if len(sys.argv) > 2 else list(ARCHITECTURES)
    )
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in chosen:
        if name in results:
            continue
        began = time.perf_counter()
        try:
            results[name] = look(name)
        except Exception as error:
            print(name, "FAILED", type(error).__name__, str(error)[:400], flush=True)
            continue
        kept.write_text(json.dumps(results))
        print(name, f"{time.perf_counter() - began:.0f} s", results[name], flush=True)
    if results:
        page.write_text(table({name: results[name] for name in ARCHITECTURES if name in results}))
    if results.keys() >= ARCHITECTURES.keys():
        kept.unlink()
