"""Quantising and dequantising what a step of decoding computes, in one CUDA kernel.

A step of one token is bound there by the count of its operations, each of which costs the host some ten microseconds.
Putting keys and values side by side, quantising and dequantising them are four; this is one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

_WARP = 32

# One warp for a group of values that share a scale and a bias, which are found as MLX's kernels for affine
# quantisation find them: the bits have to be the same.
_SOURCE = """
  constexpr int per_lane = GROUP / 32;
  const int first = blockIdx.x * GROUP + threadIdx.x * per_lane;
  const T* computed = (blockIdx.y ? values : keys) + first;
  T* read = (blockIdx.y ? read_values : read_keys) + first;
  constexpr float largest_word = (1 << BITS) - 1;

  float x[per_lane];
  float low = 3.402823466e+38f, high = 0;
  for (int i = 0; i < per_lane; i++) {
    x[i] = static_cast<float>(computed[i]);
    low = min(low, x[i]);
    high = max(high, x[i]);
  }
  for (int distance = 16; distance; distance /= 2) {
    low = min(low, __shfl_xor_sync(0xffffffff, low, distance));
    high = max(high, __shfl_xor_sync(0xffffffff, high, distance));
  }

  float scale = max((high - low) / largest_word, 1e-7f);
  const bool from_low = abs(low) > abs(high);
  if (!from_low) scale = -scale;
  const float edge = from_low ? low : high;
  const float zero = round(edge / scale);
  float bias = 0;
  if (zero != 0) {
    scale = edge / zero;
    bias = edge;
  }

  const T stored_scale = static_cast<T>(scale), stored_bias = static_cast<T>(bias);
  for (int i = 0; i < per_lane; i++) {
    const uint8_t word = min(round((x[i] - bias) / scale), largest_word);
    read[i] = stored_scale * static_cast<T>(word) + stored_bias;
  }
"""


def read_back(keys: mx.array, values: mx.array, *, bits: int, group_size: int) -> tuple[mx.array, mx.array]:
    """Both as attention reads them after they were quantised. Of one shape and type; the last axis is in groups."""
    read_keys, read_values = _kernel()(
        inputs=[keys, values],
        template=[("T", keys.dtype), ("GROUP", group_size), ("BITS", bits)],
        grid=(keys.size // group_size * _WARP, 2, 1),
        threadgroup=(_WARP, 1, 1),
        output_shapes=[keys.shape, values.shape],
        output_dtypes=[keys.dtype, values.dtype],
    )
    return read_keys, read_values


def is_available() -> bool:
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel("read_back", ["keys", "values"], ["read_keys", "read_values"], _SOURCE)
