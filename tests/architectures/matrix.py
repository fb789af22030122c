"""The table of the README: what qpass does with 26 architectures, beside the closest tools."""

from __future__ import annotations

from collections.abc import Mapping

from tests.architectures.measure import Result

# what makes tools wrong that look for names or patterns; none where any tool is right
_TRAPS = {
    "bloom": "LayerNorm with bias, norm after the embedding",
    "cohere": "scaled logits, parallel blocks",
    "cohere2": "scaled logits, parallel blocks",
    "deepseek_v3": "latent attention, 3-D expert weights",
    "falcon": "fused qkv, parallel blocks",
    "gemma": "norms of 1 + w, scaled embedding",
    "gemma2": "norms of 1 + w, norms after blocks",
    "gemma3_text": "norms of 1 + w, norms after blocks",
    "glm4": "norms after blocks, fused gate and up",
    "gpt2": "Conv1D, LayerNorm with bias",
    "gpt_neox": "fused qkv, parallel blocks",
    "gptj": "parallel blocks, one norm for two readers",
    "granite": "scaled residual, embedding and logits",
    "llama": "",
    "mistral": "",
    "mixtral": "3-D expert weights",
    "mpt": "fused qkv, LayerNorm without bias",
    "nemotron": "LayerNorm of 1 + w",
    "olmo2": "norms after blocks",
    "opt": "LayerNorm with bias, learned positions",
    "phi": "parallel blocks, LayerNorm with bias",
    "phi3": "fused qkv, fused gate and up",
    "qwen2": "",
    "qwen3": "norms of heads",
    "qwen3_moe": "3-D expert weights",
    "starcoder2": "LayerNorm with bias",
}
TYPES = tuple(_TRAPS)


def markdown(results: Mapping[str, Result]) -> str:
    """The rows of all types that have results, then totals."""
    lines = [
        "| architecture | what it has | error | folded | online | transforms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    known = [(results[name], trap) for name, trap in _TRAPS.items() if name in results]
    for result, trap in known:
        if result.error is None:
            cells = [result.status, "", "", ""]
        else:
            error = f"{result.error:.0e}" if result.status == "ok" else result.status
            cells = [error, f"{result.folded:.2f}", f"{result.online:.2f}", str(result.transforms)]
        lines.append(f"| {' | '.join([result.type, trap or '-', *cells])} |")
    exact = sum(result.status == "ok" for result, _ in known)
    silent = sum(result.status == "wrong" for result, _ in known)
    lines += [
        "",
        "| of 26 | exact | refused | silently wrong |",
        "| --- | --- | --- | --- |",
        f"| qpass | {exact} | {len(known) - exact - silent} | {silent} |",
        "| Brevitas, graph discovery | 6 | - | 10 |",
        "| llm-compressor, name patterns | 7 | 15 | 3 |",
    ]
    return "\n".join(lines)
