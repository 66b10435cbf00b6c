// SPDX-License-Identifier: Apache-2.0
// CPU kernel of map_and_record; load/ops.py defines the schema and describes the op.
#include "cpu_ops.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "index_rule.h"

namespace eplb {
namespace {

// One version per instruction set, chosen when the library is loaded; other compilers use the baseline's vectors.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define EPLB_PER_INSTRUCTION_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#define EPLB_BYTE_PERMUTATIONS __attribute__((target("avx512f,avx512bw,avx512vbmi")))
#else
#define EPLB_PER_INSTRUCTION_SET
#endif

constexpr int64_t kEntriesPerThread = 8192;  // fewer entries take less time than waking another thread
constexpr int64_t kCopies = 4;              // copies of the bins, used in turn: an add does not wait for the last store
constexpr int64_t kTile = 256;              // entries mapped at a time: their buffers stay in the first-level cache
constexpr int64_t kCacheLine = 64;          // alignment: a vector store over two lines is slow to read back
constexpr int64_t kLargestCompact = 32768;  // elements of a compact table: 64 KiB
constexpr int64_t kUsesOfCompact = 2;       // least batch entries per element for which a compact table pays
constexpr int64_t kUsesOfCompactBesideBytes = 16;  // the same if replica counts are looked up as bytes

int64_t scalar(const Tensor& t, int64_t i) { return t.is_int32() ? t.data<int32_t>()[i] : t.data<int64_t>()[i]; }

// Runs body(0) .. body(parts - 1) on torch's threads.
template <typename Body>
void in_parallel(int64_t parts, const Body& body) {
    const auto run = [](int64_t begin, int64_t end, void* context) {
        for (int64_t part = begin; part < end; ++part) (*static_cast<const Body*>(context))(part);
    };
    EPLB_TORCH(torch_parallel_for, 0, parts, 1, run, const_cast<Body*>(&body));
}

// The work on a tile is split into loops that vectorise (the next functions) and table look-ups, which are faster one
// by one than by gather instructions.

// Copies ids to 32 bits; returns whether all are experts.
EPLB_PER_INSTRUCTION_SET
bool narrow(const int64_t* ids, int64_t n, uint64_t num_experts, uint32_t* experts) {
    uint32_t bad = 0;
    for (int64_t j = 0; j < n; ++j) {
        experts[j] = static_cast<uint32_t>(ids[j]);
        bad |= static_cast<uint32_t>(static_cast<uint64_t>(ids[j]) >= num_experts);
    }
    return bad == 0;
}

EPLB_PER_INSTRUCTION_SET
bool narrow(const int32_t* ids, int64_t n, uint64_t num_experts, uint32_t* experts) {
    uint32_t bad = 0;
    const uint32_t limit = static_cast<uint32_t>(num_experts);
    for (int64_t j = 0; j < n; ++j) {
        experts[j] = static_cast<uint32_t>(ids[j]);
        bad |= static_cast<uint32_t>(static_cast<uint32_t>(ids[j]) >= limit);
    }
    return bad == 0;
}

constexpr int64_t kBytes = 256;  // most experts, and entries of a row, for which replica counts are looked up as bytes

// Valid entries of each expert's row, for a tile of experts 0..kBytes-1: 64 look-ups by a few instructions. Reads and
// writes whole buffers of the tile, whatever n.
#ifdef EPLB_BYTE_PERMUTATIONS
bool has_byte_permutations() {
    static const bool has = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw");
    return has;
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of "undefined" vectors in its own header
EPLB_BYTE_PERMUTATIONS
void look_up_bytes(const uint8_t* table, const uint32_t* experts, int64_t n, uint32_t* found) {
    __m512i quarters[4];
    for (int q = 0; q < 4; ++q) quarters[q] = _mm512_loadu_si512(table + 64 * q);
    for (int64_t j = 0; j < n; j += 64) {
        __m128i bytes[4];
        for (int q = 0; q < 4; ++q) bytes[q] = _mm512_cvtepi32_epi8(_mm512_load_si512(experts + j + 16 * q));
        __m512i expert = _mm512_castsi128_si512(bytes[0]);
        expert = _mm512_inserti32x4(expert, bytes[1], 1);
        expert = _mm512_inserti32x4(expert, bytes[2], 2);
        expert = _mm512_inserti32x4(expert, bytes[3], 3);
        const __m512i low = _mm512_permutex2var_epi8(quarters[0], expert, quarters[1]);
        const __m512i high = _mm512_permutex2var_epi8(quarters[2], expert, quarters[3]);
        const __m512i byte = _mm512_mask_blend_epi8(_mm512_movepi8_mask(expert), low, high);
        _mm512_store_si512(found + j, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(byte)));
        _mm512_store_si512(found + j + 16, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(byte, 1)));
        _mm512_store_si512(found + j + 32, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(byte, 2)));
        _mm512_store_si512(found + j + 48, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(byte, 3)));
    }
}
#pragma GCC diagnostic pop
#else
bool has_byte_permutations() { return false; }

void look_up_bytes(const uint8_t*, const uint32_t*, int64_t, uint32_t*) {}
#endif

// Element of the dispatch table for each entry of a tile. `angles`: angle of each entry's token, relative to the tile's
// first token. `valid`: valid entries of each entry's row; null: all rows have `width`.
EPLB_PER_INSTRUCTION_SET
void index_tile(const uint32_t* experts, const uint32_t* angles, const uint32_t* valid, int64_t n, uint32_t first_angle,
                uint32_t width, uint32_t row_stride, uint32_t* index) {
    if (valid == nullptr) {
        for (int64_t j = 0; j < n; ++j) {
            index[j] = experts[j] * row_stride + entry_of(first_angle + angles[j], experts[j], width);
        }
    } else {
        for (int64_t j = 0; j < n; ++j) {
            index[j] = experts[j] * row_stride + entry_of(first_angle + angles[j], experts[j], valid[j]);
        }
    }
}

// Memory that calls on one thread share.
struct Scratch {
    std::vector<uint32_t> bins;     // [parts, copies, slots], tokens of this call
    std::vector<uint32_t> valid;    // [experts]
    std::vector<uint8_t> bytes;     // [kBytes], the same as bytes, if they fit
    std::vector<uint16_t> compact;  // [experts, common width]
};

// `Element`: int64_t for the given dispatch table, or uint16_t for a compact one (see make_compact).
template <typename Id, typename Element>
struct Batch {
    static constexpr bool kCompact = std::is_same_v<Element, uint16_t>;

    const Id* ids;
    Id* out;
    int64_t top_k;
    const Element* table;
    uint32_t row_stride;
    uint32_t width;
    uint64_t num_experts;
    const uint32_t* valid;  // [experts], valid entries of each row
    const uint8_t* bytes;   // [kBytes], the same as bytes; null: not used
    bool uniform;           // whether all rows have `width` valid entries
    uint64_t num_slots;
    int64_t copy_stride;  // from one copy of the bins to the next; 0 for a single copy

    // Maps the tokens first..end-1; with `kCount` adds each mapped entry to its bin in one of the copies.
    template <bool kCount>
    void map(int64_t first, int64_t end, uint32_t* bins) const {
        if (first >= end) return;
        const int64_t tokens_per_tile = std::clamp<int64_t>(kTile / top_k, 1, end - first);
        alignas(kCacheLine) uint32_t angles[kTile] = {};
        for (int64_t row = 0, j = 0; row < tokens_per_tile; ++row) {
            const uint32_t angle = static_cast<uint32_t>(row) * kTokenStep;
            for (const int64_t stop = std::min(j + top_k, kTile); j < stop; ++j) angles[j] = angle;
        }
        for (int64_t token = first; token < end; token += tokens_per_tile) {
            const int64_t stop = std::min(token + tokens_per_tile, end) * top_k;
            const uint32_t first_angle = static_cast<uint32_t>(token) * kTokenStep;
            for (int64_t i = token * top_k; i < stop; i += kTile) {
                map_tile<kCount>(i, std::min(kTile, stop - i), first_angle, angles, bins);
            }
        }
    }

    template <bool kCount>
    void map_tile(int64_t at, int64_t n, uint32_t first_angle, const uint32_t* angles, uint32_t* bins) const {
        const Id* const from = ids + at;
        alignas(kCacheLine) uint32_t experts[kTile];
        alignas(kCacheLine) uint32_t index[kTile];
        const bool known = narrow(from, n, num_experts, experts);
        if (!known) {
            for (int64_t j = 0; j < n; ++j) experts[j] = is_expert(from[j]) ? experts[j] : 0;
        }
        if (uniform) {
            index_tile(experts, angles, nullptr, n, first_angle, width, row_stride, index);
        } else {
            alignas(kCacheLine) uint32_t valid_of[kTile];
            if (bytes != nullptr) {
                look_up_bytes(bytes, experts, n, valid_of);
            } else {
                for (int64_t j = 0; j < n; ++j) valid_of[j] = valid[experts[j]];
            }
            index_tile(experts, angles, valid_of, n, first_angle, width, row_stride, index);
        }
        if (known) {
            look_up<kCount>(index, n, out + at, bins);
        } else {
            for (int64_t j = 0; j < n; ++j) {
                if (is_expert(from[j])) {
                    look_up<kCount>(index + j, 1, out + at + j, bins);
                } else {
                    out[at + j] = from[j];
                }
            }
        }
    }

    template <bool kCount>
    void look_up(const uint32_t* __restrict index, int64_t n, Id* __restrict to, uint32_t* __restrict bins) const {
        const Element* const __restrict entries = table;
        const uint64_t slots = num_slots;
        const int64_t stride = copy_stride;
        const auto put = [=](int64_t j, uint32_t element, int64_t copy) {
            const int64_t slot = entries[element];
            to[j] = static_cast<Id>(slot);
            if constexpr (kCount) {
                if (kCompact || __builtin_expect(static_cast<uint64_t>(slot) < slots, 1)) ++bins[copy * stride + slot];
            }
        };
        int64_t j = 0;
        for (; j + kCopies <= n; j += kCopies) {
            uint32_t next[kCopies];  // one wide load instead of four
            std::memcpy(next, index + j, sizeof next);
            for (int64_t copy = 0; copy < kCopies; ++copy) put(j + copy, next[copy], copy);
        }
        for (; j < n; ++j) put(j, index[j], 0);
    }

    bool is_expert(Id id) const { return static_cast<uint64_t>(static_cast<int64_t>(id)) < num_experts; }

    // Maps the tokens first..end-1 and counts the tokens among them in real_first..real_end-1.
    void map_part(int64_t first, int64_t end, int64_t real_first, int64_t real_end, uint32_t* bins) const {
        const int64_t from = std::clamp(real_first, first, end);
        const int64_t to = std::clamp(real_end, from, end);
        map<false>(first, from, bins);
        map<true>(from, to, bins);
        map<false>(to, end, bins);
    }
};

template <typename Replicas>
bool narrow_valid(const Replicas* replicas, int64_t num_experts, int64_t width, uint32_t* valid) {
    uint32_t differs = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        valid[e] = static_cast<uint32_t>(std::clamp<int64_t>(replicas[e], 0, width));
        differs |= valid[e] ^ static_cast<uint32_t>(width);
    }
    return differs == 0;
}

// The least common multiple of the replica counts, or 0 if it exceeds `most`.
int64_t common_width(const std::vector<uint32_t>& valid, int64_t most) {
    int64_t width = 1;
    for (const uint32_t replicas : valid) {
        if (replicas > 1 && width % replicas != 0) width = std::lcm(width, static_cast<int64_t>(replicas));
        if (width > most) return 0;
    }
    return width;
}

// Copies a row's elements to 16 bits; returns the highest.
EPLB_PER_INSTRUCTION_SET
uint64_t narrow_row(const int64_t* row, int64_t n, uint16_t* compact) {
    uint64_t highest = 0;
    for (int64_t i = 0; i < n; ++i) {
        compact[i] = static_cast<uint16_t>(row[i]);
        highest = std::max(highest, static_cast<uint64_t>(row[i]));
    }
    return highest;
}

// Makes a table of 16-bit elements that holds only replicas. With `repeat` the rows' width is a multiple of each
// expert's replica count, and each replica is repeated: the same fraction of the interval chooses the same replica, so
// tokens need no look-up of the replica count. Returns whether all replicas are counted slots that fit into 16 bits.
bool make_compact(const int64_t* table, int64_t row_stride, const std::vector<uint32_t>& valid, int64_t width,
                  bool repeat, int64_t num_slots, std::vector<uint16_t>& compact) {
    compact.resize(valid.size() * static_cast<size_t>(width));
    uint64_t highest = 0;
    uint16_t* row = compact.data();
    for (size_t expert = 0; expert < valid.size(); ++expert, table += row_stride, row += width) {
        const int64_t replicas = std::max<int64_t>(valid[expert], 1);  // without any: the first entry, as in entry_of
        const int64_t times = repeat ? width / replicas : 1;
        if (times == 1) {
            highest = std::max(highest, narrow_row(table, replicas, row));
            continue;
        }
        for (int64_t i = 0; i < replicas; ++i) {
            highest = std::max(highest, static_cast<uint64_t>(table[i]));
            std::fill_n(row + i * times, times, static_cast<uint16_t>(table[i]));
        }
    }
    return highest < static_cast<uint64_t>(std::min<int64_t>(num_slots, 1 << 16));
}

EPLB_PER_INSTRUCTION_SET
void add_bins(const uint32_t* bins, int64_t num_slots, int64_t* counts) {
    for (int64_t slot = 0; slot < num_slots; ++slot) counts[slot] += bins[slot];
}

EPLB_PER_INSTRUCTION_SET
void add_bins(const uint32_t* bins, int64_t num_slots, int32_t* counts) {
    for (int64_t slot = 0; slot < num_slots; ++slot) counts[slot] += static_cast<int32_t>(bins[slot]);
}

template <typename Id>
void map_typed(const Tensor& ids, const Tensor& out, const Tensor& table, const Tensor& replicas, const Tensor& counts,
               int64_t real_first, int64_t real_end) {
    static thread_local Scratch scratch;
    const int64_t num_tokens = ids.size(0);
    const int64_t num_slots = counts.size(0);
    const int64_t width = table.size(1);
    scratch.valid.resize(static_cast<size_t>(table.size(0)));
    const bool uniform = replicas.is_int32()
                             ? narrow_valid(replicas.data<int32_t>(), table.size(0), width, scratch.valid.data())
                             : narrow_valid(replicas.data<int64_t>(), table.size(0), width, scratch.valid.data());
    const bool as_bytes =
        !uniform && has_byte_permutations() && table.size(0) <= kBytes && width < kBytes && ids.numel() >= kBytes;
    if (as_bytes) {
        scratch.bytes.resize(kBytes);
        std::copy(scratch.valid.begin(), scratch.valid.end(), scratch.bytes.begin());
    }
    const int64_t stride = (num_slots + 15) / 16 * 16;  // whole cache lines
    const int64_t copies = ids.numel() < 2 * num_slots ? 1 : kCopies;
    int64_t parts = ids.numel() / kEntriesPerThread;
    if (parts > 1) {
        uint32_t threads = 1;
        EPLB_TORCH(torch_get_num_threads, &threads);
        parts = std::min<int64_t>(parts, threads);
    }
    parts = std::max<int64_t>(parts, 1);
    const bool counting = real_first < real_end;
    if (counting) scratch.bins.assign(static_cast<size_t>(parts * copies * stride), 0);
    uint32_t* const bins = scratch.bins.data();
    if (ids.numel() == 0) return;
    const auto map_all = [&](const auto* entries, int64_t row_stride, int64_t row_width, bool one_width) {
        const Batch<Id, std::remove_const_t<std::remove_pointer_t<decltype(entries)>>> batch{
            ids.data<Id>(),
            out.mutable_data<Id>(),
            ids.size(1),
            entries,
            static_cast<uint32_t>(row_stride),
            static_cast<uint32_t>(row_width),
            static_cast<uint64_t>(table.size(0)),
            scratch.valid.data(),
            as_bytes ? scratch.bytes.data() : nullptr,
            one_width,
            static_cast<uint64_t>(num_slots),
            copies == 1 ? 0 : stride};
        const auto map_part = [&](int64_t part) {
            batch.map_part(num_tokens * part / parts, num_tokens * (part + 1) / parts, real_first, real_end,
                           bins + part * copies * stride);
        };
        if (parts == 1) {
            map_part(0);
        } else {
            in_parallel(parts, map_part);
        }
    };
    const int64_t* const entries = table.data<int64_t>();
    const int64_t uses = as_bytes ? kUsesOfCompactBesideBytes : kUsesOfCompact;
    const int64_t most = std::min(kLargestCompact, ids.numel() / uses) / std::max<int64_t>(table.size(0), 1);
    const int64_t common = most >= 1 ? common_width(scratch.valid, most) : 0;
    const int64_t compact_width = common > 0 ? common : width;
    if (compact_width <= most &&
        make_compact(entries, table.stride(0), scratch.valid, compact_width, common > 0, num_slots, scratch.compact)) {
        map_all(static_cast<const uint16_t*>(scratch.compact.data()), compact_width, compact_width, common > 0);
    } else {
        map_all(entries, table.stride(0), width, uniform);
    }
    for (int64_t copy = 0; counting && copy < parts * copies; ++copy) {
        if (counts.is_int32()) {
            add_bins(bins + copy * stride, num_slots, counts.mutable_data<int32_t>());
        } else {
            add_bins(bins + copy * stride, num_slots, counts.mutable_data<int64_t>());
        }
    }
}

}  // namespace

Tensor map_and_record_cpu(const Arguments& given) {
    int64_t real_first = 0;
    int64_t real_end = given.topk_ids.size(0);
    if (given.num_unpadded) {
        const int64_t numbers = given.num_unpadded->numel();
        if (numbers == 2) real_first = std::max<int64_t>(scalar(*given.num_unpadded, 0), 0);
        real_end = std::min(scalar(*given.num_unpadded, numbers - 1), real_end);
    }
    if (!*given.record.data<bool>()) real_end = real_first;
    Tensor out = given.topk_ids.empty_like();
    const auto map = [&](const Tensor& ids) {
        const auto typed = ids.is_int64() ? map_typed<int64_t> : map_typed<int32_t>;
        typed(ids, out, given.dispatch_table, given.replica_count, given.counts, real_first, real_end);
    };
    if (given.topk_ids.is_contiguous()) {
        map(given.topk_ids);
    } else {
        map(given.topk_ids.copy());
    }
    return out;
}

}  // namespace eplb
