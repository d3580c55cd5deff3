// How the CPU engine lays out a chain's parameters: what chain.cpp writes and every instruction set reads.
//
//   outputs are cut into blocks of at most kBlock, as equal as can be: block b holds [first(b), first(b + 1))
//   conv, direct     forward [block][c, r, s][output];  backward, for each class (i, j) of input pixels modulo the
//   stride:
//                    [block of inputs][o, tap][input], taps r = i, i + sh, ...; s = j, j + sw, ...
//   conv, Winograd   forward [block][36][c][output];  backward [block of inputs][36][o][input], of the flipped kernel
//   linear           forward [block][k][output];  backward [block of inputs][o][input]
//   then bias [outputs]; affine: scale, shift; leaky: slope
#pragma once
#include "core/chain.h"

namespace tsr {
namespace {

constexpr int64_t kBlock = 8;

struct Blocks {
  int64_t size, count;
  explicit Blocks(int64_t n) : size(n), count((n + kBlock - 1) / kBlock) {}
  int64_t first(int64_t b) const { return b * size / count; }
};

// Offsets of one record's parts in the packed parameters.
struct Packed {
  int64_t forward, backward, bias, slope, end;
  Packed(const ChainRecord& r, int64_t begin) : forward(begin) {
    int64_t values = 0;
    if (r.kind == ChainKind::conv) values = r.oc * r.c * (r.winograd ? 36 : r.kh * r.kw);
    if (r.kind == ChainKind::linear) values = r.oc * r.c;
    backward = forward + values;
    bias = backward + values;
    int64_t biases = r.kind == ChainKind::conv || r.kind == ChainKind::linear ? r.oc : 0;
    if (r.kind == ChainKind::affine) biases = 2 * r.c;  // scale, shift
    slope = bias + biases;
    end = slope + (r.activation == ChainActivation::leaky_relu ? 1 : 0);
  }
};

// Winograd's F(4x4, 3x3) at the points 0, +-a, +-b and infinity. These two keep the rounding error near that of a plain
// sum (0, +-1, +-2 have 2.5 times as much) and their powers are exact in float32.
constexpr double kWinogradA = 0.625, kWinogradB = 1.5;

// Taps along one axis of input pixels y with (y + pad) % stride == i: r = i, i + stride, ...
constexpr int64_t taps_of(int64_t kernel, int64_t stride, int64_t i) {
  return i < kernel ? (kernel - i + stride - 1) / stride : 0;
}

}  // namespace
}  // namespace tsr
