"""
Would the U-Net be faster if its operators were written in another way?

    OMP_NUM_THREADS=1 python benchmarks/operators.py [--only WORD] [--int8]

Each operator as it is, then other ways to the same result, at the sizes of a guided step of 256 × 256 pixels with the
published U-Net. Ways run in turns, and the table has medians of their processor time, which other programs change little
with one thread. `--int8` adds linears quantized by torchao, as they are and compiled. Packed weights and oneDNN's own
linear use private functions of torch.
"""

import argparse
import copy
import functools
import statistics

import torch
import torch.nn.functional as F
from inference import machine, processor_time

from paella_diffusers.models.attention import chunked_attention
from paella_diffusers.models.unet_paella import GlobalResponseNorm


def linear(dtype: torch.dtype, rows: int, channels: int, outputs: int, int8: bool):
    layer = torch.nn.Linear(channels, outputs).to(dtype)
    x, weight, bias = torch.randn(rows, channels).to(dtype), layer.weight, layer.bias
    pixels = x.view(1, rows, 1, channels).permute(0, 3, 1, 2)
    ways = {"as it is": lambda: layer(x), "1 × 1 convolution": lambda: F.conv2d(pixels, weight[:, :, None, None], bias)}
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        ways["weights packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        ways["by oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if int8:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantized = torch.nn.Sequential(copy.deepcopy(layer))
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
        torch.compiler.reset()  # it compiles eight sizes of one function at most
        compiled = torch.compile(quantized, dynamic=False)
        left, right = (torch.randint(-127, 128, states.shape, dtype=torch.int8) for states in (x, weight))
        ways["int8"], ways["int8, compiled"] = lambda: quantized(x), lambda: compiled(x)
        ways["int8, the product alone"] = lambda: torch._int_mm(left, right.t())
    return ways


def queries_keys_values(dtype: torch.dtype, rows: int):
    x, weight = torch.randn(rows, 1280).to(dtype), torch.randn(3840, 1280).to(dtype)
    parts = [part.clone() for part in weight.chunk(3)]
    return {"as they are": lambda: [F.linear(x, part) for part in parts], "one product": lambda: F.linear(x, weight)}


def gelu(dtype: torch.dtype):
    hidden = torch.randn(2, 16, 16, 5120).to(dtype)
    return {"as it is": lambda: F.gelu(hidden), "by tanh": lambda: F.gelu(hidden, approximate="tanh")}


def response_norm(dtype: torch.dtype, then_linear: bool):
    hidden = torch.randn(2, 16, 16, 5120).to(dtype)
    norm, out = GlobalResponseNorm(5120).to(dtype), torch.nn.Linear(5120, 1280).to(dtype)
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.beta)

    def folded():
        """Its factor and shift in the linear's weights and bias, which then differ from image to image."""
        response = hidden.square().sum(dim=(1, 2)).clamp(min=1e-30).sqrt()
        factors = 1 + norm.gamma.flatten() * response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        bias = out.bias + out.weight @ norm.beta.flatten()
        return torch.stack([F.linear(image, out.weight * factor, bias) for image, factor in zip(hidden, factors)])

    return (
        {"as they are": lambda: out(norm(hidden)), "folded": folded} if then_linear else {"as it is": lambda: norm(hidden)}
    )


def attention(dtype: torch.dtype, tokens: int):
    query, key, value = (torch.randn(2, length, 16, 80).to(dtype) for length in (tokens, tokens + 40, tokens + 40))
    mask = torch.ones(2, tokens + 40, dtype=torch.bool)
    whole = [states.transpose(1, 2) for states in (query, key, value)]
    return {
        "by parts": lambda: chunked_attention(query, key, value, mask),
        "by torch": lambda: F.scaled_dot_product_attention(*whole, attn_mask=mask[:, None, None]),
    }


def convolution_up(dtype: torch.dtype, channels: int, outputs: int, side: int):
    x, bias = torch.randn(2, side, side, channels).to(dtype), torch.randn(outputs).to(dtype)
    weight = torch.randn(channels, outputs, 2, 2).to(dtype)

    def product():
        pixels = (x.flatten(0, 2) @ weight.flatten(1)).view(2, side, side, outputs, 2, 2).permute(0, 1, 4, 2, 5, 3)
        return pixels.reshape(2, 2 * side, 2 * side, outputs).add_(bias)

    return {
        "as it is": lambda: F.conv_transpose2d(x.permute(0, 3, 1, 2), weight, bias, stride=2),
        "product": product,
    }


def convolution_down(dtype: torch.dtype):
    x, bias = torch.randn(2, 32, 32, 640).to(dtype), torch.randn(1280).to(dtype)
    weight = torch.randn(1280, 640, 2, 2).to(dtype)
    patches = lambda: x.view(2, 16, 2, 16, 2, 640).transpose(2, 3).flatten(3)
    return {
        "as it is": lambda: F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2),
        "product": lambda: F.linear(patches(), weight.permute(0, 2, 3, 1).flatten(1), bias),
    }


def operators(int8: bool) -> dict:
    """What makes each operator's ways, for a dtype."""
    ways = {}
    for rows, channels, outputs in (
        (512, 1280, 5120),
        (512, 5120, 1280),
        (512, 1280, 1280),
        (128, 1280, 5120),
        (128, 5120, 1280),
        (128, 1280, 1280),
    ):
        name = f"linear, {rows} × {channels} to {outputs}"
        ways[name] = functools.partial(linear, rows=rows, channels=channels, outputs=outputs, int8=int8)
    for rows in (512, 128):
        ways[f"queries, keys, values, {rows} × 1280"] = functools.partial(queries_keys_values, rows=rows)
    ways["gelu, 512 × 5120"] = gelu
    ways["response norm, 512 × 5120"] = functools.partial(response_norm, then_linear=False)
    ways["response norm and linear"] = functools.partial(response_norm, then_linear=True)
    for tokens in (64, 256, 1024):
        ways[f"attention, {tokens} tokens"] = functools.partial(attention, tokens=tokens)
    ways["transposed convolution, 8 × 8"] = functools.partial(convolution_up, channels=1280, outputs=1280, side=8)
    ways["transposed convolution, 16 × 16"] = functools.partial(convolution_up, channels=1280, outputs=640, side=16)
    ways["convolution down, 32 × 32"] = convolution_down
    return ways


def compare(ways: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns."""
    times = {way: [] for way in ways}
    for repeat in range(repeats + 1):  # the first is to warm up
        for way, function in ways.items():
            start = processor_time()
            function()
            if repeat:
                times[way].append(processor_time() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="operators whose name has one")
    parser.add_argument("--int8", action="store_true", help="needs torchao")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(machine(), "\n")
    print("| dtype | operator | way | processor time | × as fast |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for dtype in args.dtypes:
            for name, make in operators(args.int8).items():
                if not any(word in name for word in args.only):
                    continue
                times = compare(make(getattr(torch, dtype)), args.repeats)
                as_it_is = next(iter(times.values()))
                for way, seconds in times.items():
                    ratio = statistics.median(now / other for now, other in zip(as_it_is, seconds))
                    milliseconds = statistics.median(seconds) * 1e3
                    print(f"| {dtype} | {name} | {way} | {milliseconds:.2f} ms | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
