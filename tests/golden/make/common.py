"""What the scripts here share: writing a golden case or a key list.  Needs the ``parity`` extra (torch).

python tests/golden/make/<family>.py        # writes tests/golden/backbones/* and tests/golden/keys/*
"""

import gzip
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent


def seeded(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """Perturbs every float parameter and buffer, so that none keeps a value (0, 1) that hides a lost weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point():
                continue
            noise = torch.randn(x.shape, generator=generator)
            if name.endswith("running_var"):
                x.copy_(0.5 + noise.abs())
            else:
                x.add_(scale * noise * (1.0 if x.ndim < 2 else 1 / np.sqrt(x.shape[-1])))
    return model


def save_case(name, state_dict, config, inputs, outputs, call, library):
    """Writes one golden case.

    Args:
      name: of the folder.
      state_dict: in the library's own keys; shared tensors are stored once, under the first name.
      config: what stands in config.json (or ``None``: the source has none).
      inputs, outputs: name -> tensor or array.
      call: the call that made the outputs, as text, the model's class and settings included.
      library: distribution(s) whose versions are recorded: ``"transformers"`` or a tuple.
    """
    folder = GOLDEN / "backbones" / name
    folder.mkdir(parents=True, exist_ok=True)
    seen, weights = {}, {}
    for key, x in state_dict.items():
        x = x.detach()
        if x.data_ptr() in seen and x.numel() and x.shape == state_dict[seen[x.data_ptr()]].shape:
            continue
        seen[x.data_ptr()] = key
        weights[key] = x.contiguous().clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    arrays = {f"in.{k}": _array(v) for k, v in inputs.items()} | {f"out.{k}": _array(v) for k, v in outputs.items()}
    np.savez_compressed(folder / "io.npz", **arrays)
    libraries = (library,) if isinstance(library, str) else tuple(library)
    versions = {p: metadata.version(p) for p in ("torch", *libraries)}
    (folder / "case.json").write_text(json.dumps({"call": call, "versions": versions}, indent=1) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB")


def save_keys(name, layout, model, config, total, source, drop=(), extra=None):
    """Writes the key list of a full-size checkpoint.

    Args:
      name: of the published model: ``bert-base-uncased``.
      layout: the layout's name.
      model: a torch module on the meta device, or key -> shape.
      config: config.json's content, or ``None``.
      total: published number of parameters (what counts as one follows the publication; see ``source``).
      source: where the total is published.
      drop: keys that the real file does not hold (tied copies).
      extra: key -> shape that the real file holds besides (buffers).
    """
    shapes = model if isinstance(model, dict) else {k: list(v.shape) for k, v in model.state_dict().items()}
    shapes = {k: list(v) for k, v in shapes.items() if k not in drop} | {k: list(v) for k, v in (extra or {}).items()}
    document = {"layout": layout, "config": config, "total": total, "source": source, "keys": shapes}
    path = GOLDEN / "keys" / f"{name}.json.gz"
    path.parent.mkdir(exist_ok=True)
    # no time stamp in the file: the same list is the same bytes
    path.write_bytes(gzip.compress(json.dumps(document, default=str).encode(), mtime=0))
    print(f"{name}: {len(shapes)} keys, {path.stat().st_size / 1024:.1f} KiB")


def _array(x):
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
