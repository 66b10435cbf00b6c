// SPDX-License-Identifier: Apache-2.0
// The "random" policy: a valid placement drawn from a seed, for tests and as a baseline without load.
#pragma once

#include <cstdint>

namespace eplb {

// Writes slots [num_slots]: every expert at least once, redundant copies of experts drawn at random, no expert twice on
// a rank if num_slots <= num_experts * num_ranks. Equal seeds give equal placements on every machine.
void draw_placement(uint64_t seed, int num_experts, int num_slots, int num_ranks, int32_t* slots);

}  // namespace eplb
