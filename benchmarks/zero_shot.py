"""Time SDP, SDP+, WinCLIP, AnomalyCLIP and APRIL-GAN, and open_clip's plain image encoder.

The script prints one JSON line with three results for each batch size: the processor seconds of
each method and of the encoder (the minimum over interleaved rounds in one process with the same
threads), the ratios of the methods' seconds to those of the encoder, and the largest difference
between the package's maps and those of a plain implementation (equations in the methods' pages in
``docs/methods``). All have the same model with random weights. AnomalyCLIP is timed with its own
inference and that of Crane, APRIL-GAN with and without the memory of four reference images. The
exit status is 1 if a ratio is above its target or if maps differ by more than 1e-4.

    python benchmarks/zero_shot.py --rounds 9 --threads 1
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import Bound, at_most, fastest, parser, report
from scipy.ndimage import gaussian_filter
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.methods import APRILGAN, SDP, AnomalyCLIP, SDPPlus, WinCLIP
from anomaly_clip.records import Scores

MOST_APART = 1e-4  # largest difference from the plain implementation's maps
TARGETS = {
    "sdp": 1.20,
    "sdp_plus": 1.25,
    "winclip": 11.5,
    "anomalyclip": 1.25,
    "crane": 1.40,
    "april_gan": 1.15,
    "april_gan_4_shots": 1.25,
}
SHOTS = 4
Scorer = Callable[[Tensor, Tensor], Scores]


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--name", default="ViT-B-16-plus-240")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backbone = CLIPBackbone.of(CLIPSettings(options.name, "random"))
    sdp, plus, winclip = SDP(backbone), SDPPlus(backbone), WinCLIP(backbone)
    anomalyclip, crane = AnomalyCLIP(backbone), AnomalyCLIP(backbone, inference="crane")
    april_gan = APRILGAN(backbone)
    side = backbone.image_size
    references = torch.randint(0, 256, (SHOTS, 3, side, side), dtype=torch.uint8)
    memory = [april_gan.remember(references)]
    # Each method, and its plain implementation, as functions of images and texts.
    methods: dict[str, tuple[Scorer, Callable[[Tensor, Tensor], Tensor]]] = {
        "sdp": (sdp.score_with_text, partial(plain_sdp, sdp)),
        "sdp_plus": (plus.score_with_text, partial(plain_sdp_plus, plus)),
        "winclip": (winclip.score_with_text, partial(plain_winclip, winclip)),
        "anomalyclip": (
            lambda images, _: anomalyclip.score(images, ["any"] * len(images)),
            lambda images, _: plain_anomalyclip(anomalyclip, images),
        ),
        "crane": (
            lambda images, _: crane.score(images, ["any"] * len(images)),
            lambda images, _: plain_anomalyclip(crane, images),
        ),
        "april_gan": (april_gan.score_with_text, partial(plain_april_gan, april_gan)),
        "april_gan_4_shots": (
            partial(april_gan.score_with_text, memory=memory),
            partial(plain_april_gan, april_gan, references=references),
        ),
    }
    methods = {name: methods[name] for name in options.only}
    values: dict[str, object] = {
        "model": options.name,
        "weights": "random",
        "precision": "float32",
        "rounds": options.rounds,
    }
    bounds: dict[str, Bound] = {}
    for size in options.batches:
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
        text = F.normalize(torch.randn(size, backbone.model.visual.output_dim, 2), dim=1)
        pixels = backbone.prepare(images)
        tasks: dict[str, Callable[[], object]] = {
            "plain": partial(backbone.model.encode_image, pixels)
        }
        tasks |= {name: partial(score, images, text) for name, (score, _) in methods.items()}
        with torch.no_grad():
            seconds = fastest(options.rounds, tasks)
        ratios = {name: seconds[name] / seconds["plain"] for name in methods}
        few, texts = images[:1], text[:1]  # the plain implementations are slow
        with torch.no_grad():
            apart = {
                name: float((score(few, texts)["anomaly_map"] - plain(few, texts)).abs().max())
                for name, (score, plain) in methods.items()
            }
        for name, ratio in ratios.items():
            bounds[f"{name} over plain, batch {size}"] = at_most(ratio, TARGETS[name])
        largest = max(apart.values())
        bounds[f"largest map difference, batch {size}"] = at_most(largest, MOST_APART)
        values[f"batch_{size}"] = {
            **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
            **{f"{name}_ratio": round(value, 3) for name, value in ratios.items()},
            "largest_map_difference": apart,
        }
    return report("zero_shot", values, bounds)


def plain_stages(backbone: CLIPBackbone, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the original and the surgery tokens of each stage (``docs/methods/sdp.md``)."""
    visual = backbone.visual
    original = backbone.embed(images)
    width = original.shape[-1]
    surgery, kept, previous = original, {}, None
    step = len(visual.transformer.resblocks) // 4
    for number, block in enumerate(visual.transformer.resblocks, start=1):
        attention = block.attn
        mixed = block.ln_1(original) @ attention.in_proj_weight.T + attention.in_proj_bias
        q, k, v = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in mixed.split(width, dim=-1)
        )
        scale = q.shape[-1] ** -0.5
        ordinary = (q @ k.mT * scale).softmax(-1) @ v
        ordinary = attention.out_proj(ordinary.transpose(1, 2).flatten(2))
        values = (v @ v.mT * scale).softmax(-1) @ v
        values = attention.out_proj(values.transpose(1, 2).flatten(2))
        if previous is not None:
            kept[number - 1] = (original + ordinary, previous)
        surgery = values if (number - 1) % step == 0 else surgery + values
        original = original + ordinary
        original = original + block.mlp(block.ln_2(original))
        previous = surgery if number % step == 0 else None
    kept[len(visual.transformer.resblocks)] = (original, surgery)
    return list(kept.values())


def plain_unblurred(sdp: SDP, stages: list[tuple[Tensor, Tensor]], text: Tensor) -> Tensor:
    """Compute SDP's map before its Gaussian filter (``docs/methods/sdp.md``)."""
    visual = sdp.backbone.visual
    total = torch.zeros(len(text), stages[0][0].shape[1] - 1)
    for first, patches in stages:
        tokens = torch.cat([first[:, :1], patches[:, 1:]], dim=1)
        tokens = F.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)
        weights = (tokens[:, :1] @ text).softmax(-1)
        weighted = tokens @ text * weights * 2
        total += (weighted - weighted.mean(-1, keepdim=True))[:, 1:, 1]
    return upsampled(total, sdp.image_size)


def upsampled(values: Tensor, size: int, *, align_corners: bool = False) -> Tensor:
    side = round(values.shape[1] ** 0.5)
    grid = values.reshape(-1, 1, side, side)
    return F.interpolate(grid, (size, size), mode="bilinear", align_corners=align_corners)[:, 0]


def blurred(maps: Tensor, sigma: float) -> Tensor:
    return torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), sigma)) for m in maps])


def plain_sdp(sdp: SDP, images: Tensor, text: Tensor) -> Tensor:
    stages = plain_stages(sdp.backbone, images)
    return blurred(plain_unblurred(sdp, stages, text), sdp.sigma)


def plain_sdp_plus(plus: SDPPlus, images: Tensor, text: Tensor) -> Tensor:
    """Compute SDP+'s maps (``docs/methods/sdp_plus.md``)."""
    stages = plain_stages(plus.backbone, images)
    total = plain_unblurred(plus, stages, text)
    for layer, (tokens, _) in zip(plus.fc, stages, strict=True):
        logits = 100 * (F.normalize(layer(tokens[:, 1:]), dim=-1) @ text)
        both = [upsampled(logits[..., k], plus.image_size, align_corners=True) for k in (0, 1)]
        total = total + torch.stack(both).softmax(0)[1]
    return blurred(total, plus.blur)


def plain_winclip(winclip: WinCLIP, images: Tensor, text: Tensor) -> Tensor:
    """Compute the map of one image, one window at a time (``docs/methods/winclip.md``)."""
    backbone = winclip.backbone
    tokens = backbone.embed(images)
    side = round((tokens.shape[1] - 1) ** 0.5)

    def score(part: Tensor) -> float:
        for block in backbone.visual.transformer.resblocks:
            part = block(part)
        embedding = F.normalize(backbone.project(part[:, 0]), dim=-1)
        return float((embedding @ text[0] / winclip.temperature).softmax(-1)[0, 1])

    inverse = torch.full((side, side), 1 / score(tokens))
    grid = torch.arange(1, side * side + 1).reshape(side, side)
    for scale in winclip.scales:
        total, count = torch.zeros(side, side), torch.zeros(side, side)
        for top in range(side - scale + 1):
            for left in range(side - scale + 1):
                rows, columns = slice(top, top + scale), slice(left, left + scale)
                members = grid[rows, columns].flatten()
                value = score(torch.cat([tokens[:, :1], tokens[:, members]], dim=1))
                total[rows, columns] += 1 / value
                count[rows, columns] += 1
        inverse += total / count
    means = (len(winclip.scales) + 1) / inverse
    return upsampled(means.reshape(1, -1), winclip.image_size)


def plain_anomalyclip(method: AnomalyCLIP, images: Tensor) -> Tensor:
    """Compute AnomalyCLIP's maps, of its own or of Crane's inference, from the last block."""
    visual = method.backbone.visual
    original = dense = method.backbone.embed(images)
    blocks = visual.transformer.resblocks
    for number, block in enumerate(blocks, start=1):
        attention = block.attn
        mixed = block.ln_1(original) @ attention.in_proj_weight.T + attention.in_proj_bias
        q, k, v = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in mixed.chunk(3, dim=-1)
        )
        scale = q.shape[-1] ** -0.5
        if number > len(blocks) - method.dense_blocks:
            pairs = [q, k, v] if method.is_crane else [v]
            values = sum((same @ same.mT * scale).softmax(-1) for same in pairs) @ v
            dense = dense + attention.out_proj(values.transpose(1, 2).flatten(2))
        ordinary = attention.out_proj(
            ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        original = original + ordinary
        original = original + block.mlp(block.ln_2(original))
        if number <= len(blocks) - method.dense_blocks:
            dense = original
    tokens = F.normalize(visual.ln_post(dense[:, 1:]) @ visual.proj, dim=-1)
    abnormal = (tokens @ method.text() / method.temperature).softmax(-1)[..., 1]
    return blurred(upsampled(abnormal, method.image_size), method.sigma)


def plain_april_gan(
    method: APRILGAN, images: Tensor, text: Tensor, references: Tensor | None = None
) -> Tensor:
    """Compute APRIL-GAN's maps, with or without reference images."""

    def layers(of: Tensor) -> list[Tensor]:
        tokens, kept = method.backbone.embed(of), []
        for number, block in enumerate(method.backbone.visual.transformer.resblocks, start=1):
            tokens = block(tokens)
            if number in method.layers:
                kept.append(tokens[:, 1:])
        return kept

    total = torch.zeros(len(images), method.image_size, method.image_size)
    patches = layers(images)
    for layer, tokens in zip(method.fc, patches, strict=True):
        logits = 100 * (F.normalize(layer(tokens), dim=-1) @ text)
        both = [upsampled(logits[..., k], method.image_size, align_corners=True) for k in (0, 1)]
        total = total + torch.stack(both).softmax(0)[1]
    if references is not None:
        for tokens, memory in zip(patches, layers(references), strict=True):
            rows = F.normalize(memory.flatten(0, 1), dim=-1)
            distance = 1 - (F.normalize(tokens, dim=-1) @ rows.T).amax(-1)
            total = total + upsampled(distance, method.image_size, align_corners=True)
    return total


if __name__ == "__main__":
    sys.exit(main())
