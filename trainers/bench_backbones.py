"""``zoo bench backbones`` (attention, ResNet-50, a decoder block) and ``zoo bench import`` (time and peak memory)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.bench import roofline, run_one
from trainers.recipe import Benchmark
from zoo.nn.attention import attention
from zoo.nn.partitioning import abstract_variables, unbox
from zoo.nn.resnet import ResNet, ResNetConfig


def backbones() -> list[dict[str, Any]]:
    """Times the forward passes that most systems spend their time in."""
    peak_flops, peak_bytes = roofline()
    return [run_one(b, peak_flops, peak_bytes) for b in (*_attention(), _resnet(), *_decoder())]


def _attention() -> list[Benchmark]:
    batch, tokens, heads, width = 4, 512, 8, 64
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, tokens, heads, width))
    flops = 4.0 * batch * heads * tokens * tokens * width
    least = 4.0 * q.size * 4

    def plain(q, k, v):
        scores = jnp.einsum("btnd,bsnd->bnts", q, k) / width**0.5
        scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -jnp.inf)
        return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores), v)

    grouped = (q, k[:, :, :2], v[:, :, :2])
    ours = lambda q, k, v: attention(q, k, v, causal=True)  # noqa: E731
    note = "all scores are computed; the causal half would do"
    return [
        Benchmark(
            "attention, 4 x 512 x 8 x 64, causal", ours, (q, k, v), flops, least, {"einsum": jax.jit(plain)}, note
        ),
        Benchmark("attention, 8 query heads on 2", ours, grouped, flops, least * 0.625),
    ]


def _resnet() -> Benchmark:
    module = ResNet(ResNetConfig.of_depth(50, classes=1000))
    variables = _random(module)
    x = jax.random.normal(jax.random.key(1), (4, 224, 224, 3))
    macs = 4.09e9  # of one image: He et al. (2016), with torchvision's stride in the 3 x 3 convolution
    least = sum(v.nbytes for v in jax.tree.leaves(variables)) + x.nbytes
    return Benchmark(
        "ResNet-50, 4 images of 224", lambda v, x: module.apply(v, x)["logits"], (variables, x), 8 * macs, least
    )


def _decoder() -> list[Benchmark]:
    from zoo.nn.decoder_lm import DecoderConfig, DecoderLM

    d, hidden, heads, kv, tokens = 1024, 2816, 16, 4, 256
    config = DecoderConfig(
        vocab_size=32, hidden_size=d, num_layers=1, num_heads=heads, num_kv_heads=kv, mlp_dim=hidden,
        positions="rotary", norm="rms", gated=True, activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False,
        head="none",
    )  # fmt: skip
    module = DecoderLM(config)
    variables = _random(module)
    stream = jax.random.normal(jax.random.key(1), (2, tokens, d))
    weights = 2 * d * d + 2 * d * d * kv // heads + 3 * d * hidden
    size = sum(v.nbytes for v in jax.tree.leaves(variables))

    def block(v, x):
        return module.apply(v, embeddings=x).last_hidden_state

    cache = module.init_cache(2, tokens)
    cache = jax.jit(lambda v, x, c: module.apply(v, embeddings=x, cache=c).cache)(variables, stream[:, :-1], cache)

    def step(v, x, cache):
        return module.apply(v, embeddings=x, cache=cache).last_hidden_state

    work = 2.0 * 2 * tokens * weights + 4.0 * 2 * tokens * tokens * d
    return [
        Benchmark("decoder block, 2 x 256 x 1024", block, (variables, stream), work, size + 2 * stream.nbytes),
        Benchmark("decoder block, one token with its cache", step, (variables, stream[:, -1:], cache), work / tokens,
                  size + sum(x.nbytes for x in jax.tree.leaves(cache)), {}, "bound by reading the weights"),
    ]  # fmt: skip


def _random(module: Any) -> Any:
    abstract = unbox(abstract_variables(module))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(np.abs(rng.normal(size=x.shape)).astype(x.dtype) * 0.02), abstract)


CHILD = """
import json, resource, sys, time
import jax, orbax.checkpoint
from checkpoints.importers.importing import import_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
jax.devices()
before, start = peak(), time.perf_counter()
outcome = import_model(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - start, "before": before, "peak": peak()}))
"""


def importing(layers: int = 12, width: int = 1536) -> list[dict[str, Any]]:
    """Imports a made-up LLaMA of about half a gigabyte in a process of its own: time, and the peak above its start."""
    from checkpoints.importers.writing import write_safetensors

    hidden, tokens = 4 * width, 8000
    shapes = {
        "model.embed_tokens.weight": (tokens, width),
        "lm_head.weight": (tokens, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        block = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"}
        block |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden)}
        block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{i}.{n}.weight": s for n, s in block.items()}
    config = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": tokens,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_theta": 10000.0, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    some = np.random.default_rng(0).normal(size=1 << 20).astype(jnp.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        makers = {n: (lambda s=s: np.resize(some, s)) for n, s in shapes.items()}
        write_safetensors(source / "model.safetensors", makers, {n: (s, some.dtype) for n, s in shapes.items()})
        run = [sys.executable, "-c", CHILD, str(source), str(Path(folder) / "model")]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    sizes = [2 * int(np.prod(s)) for s in shapes.values()]
    row = {"operation": "import of a bfloat16 LLaMA", "seconds": found["seconds"], "parameters": sum(sizes) // 2,
           "model_bytes": sum(sizes), "largest_tensor_bytes": max(sizes), "peak_bytes": found["peak"] - found["before"],
           "peak_share_of_model": (found["peak"] - found["before"]) / sum(sizes)}  # fmt: skip
    return [row]
