// Philox 4x32-10: random numbers as a pure function of a counter (Salmon et al., SC 2011).
//
//   key = seed (64 bit);  counter = (element block, draw, image low, image high)
//
// The number for (seed, image, draw, element) is the same on every device, in any batch, process or order.
#pragma once
#include "core/portable.h"

namespace tsr {

struct Philox4 {
  uint32_t v[4];
};

TSR_HD Philox4 philox(uint64_t seed, uint64_t image, uint32_t draw, uint32_t block) {
  uint32_t c0 = block, c1 = draw, c2 = uint32_t(image), c3 = uint32_t(image >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1) with 24 bits: every value is exact in float32.
TSR_HD float unit_interval(uint32_t bits) { return float(bits >> 8) * 0x1p-24f; }

}  // namespace tsr
