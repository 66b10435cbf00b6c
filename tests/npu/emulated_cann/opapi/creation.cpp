// SPDX-License-Identifier: Apache-2.0
// Filling, ranges, shapes and random numbers.
#include <ATen/CPUGeneratorImpl.h>

#include "operator.h"

ACLNN(aclnnInplaceZero, [](Out self) { self.tensor.zero_(); });
ACLNN(aclnnInplaceOne, [](Out self) { self.tensor.fill_(1); });
ACLNN(aclnnInplaceFillScalar, [](Out self, Num value) { self.tensor.fill_(value); });
ACLNN(aclnnInplaceFillTensor, [](Out self, In value) { self.tensor.fill_(value.reshape({})); });
ACLNN(aclnnInplaceFillDiagonal, [](Out self, Num value, bool wrap) { self.tensor.fill_diagonal_(value, wrap); });
ACLNN(aclnnEye, [](int64_t rows, int64_t columns, Out out) { out = at::eye(rows, columns); });
ACLNN(aclnnArange,
      [](Num start, Num end, Num step, Out out) { out = at::arange(start, end, step, out.tensor.options()); });
ACLNN(aclnnRange,
      [](Num start, Num end, Num step, Out out) { out = at::range(start, end, step, out.tensor.options()); });
ACLNN(aclnnLinspace, [](Num start, Num end, int64_t steps, Out out) { out = at::linspace(start, end, steps); });

ACLNN(aclnnCat, [](Ins tensors, int64_t dim, Out out) {
    // cat skips the legacy empty tensor; promotion is the output's.
    for (auto& tensor : tensors) tensor = tensor.to(out.tensor.scalar_type());
    out = at::cat(static_cast<const std::vector<at::Tensor>&>(tensors), dim);
});
ACLNN(aclnnStack, [](Ins tensors, int64_t dim, Out out) {
    out = at::stack(static_cast<const std::vector<at::Tensor>&>(tensors), dim);
});
ACLNN(aclnnSplitWithSize, [](In self, Ints sizes, int64_t dim, Outs out) {
    auto parts = at::split_with_sizes(self, sizes, dim);
    for (size_t i = 0; i < parts.size(); ++i) out[i] = parts[i];
});
ACLNN(aclnnRepeat, [](In self, Ints repeats, Out out) { out = self.repeat(repeats); });
ACLNN(aclnnRepeatInterleave, [](In self, In repeats, int64_t, Out out) { out = at::repeat_interleave(self, repeats); });
ACLNN(aclnnRepeatInterleaveInt,
      [](In self, int64_t repeats, int64_t, Out out) { out = at::repeat_interleave(self, repeats); });
ACLNN(aclnnRepeatInterleaveWithDim,
      [](In self, In repeats, int64_t dim, int64_t, Out out) { out = at::repeat_interleave(self, repeats, dim); });
ACLNN(aclnnRepeatInterleaveIntWithDim,
      [](In self, int64_t repeats, int64_t dim, int64_t, Out out) { out = at::repeat_interleave(self, repeats, dim); });
ACLNN(aclnnRepeatInterleaveTensor, [](In repeats, int64_t, Out out) { out = at::repeat_interleave(repeats); });
ACLNN(aclnnFlip, [](In self, Ints dims, Out out) { out = at::flip(self, dims); });
ACLNN(aclnnRoll, [](In self, Ints shifts, Ints dims, Out out) { out = at::roll(self, shifts, dims); });
ACLNN(aclnnTril, [](In self, int64_t diagonal, Out out) { out = at::tril(self, diagonal); });
ACLNN(aclnnTriu, [](In self, int64_t diagonal, Out out) { out = at::triu(self, diagonal); });
ACLNN(aclnnInplaceTril, [](Out self, int64_t diagonal) { self = at::tril(self.tensor, diagonal); });
ACLNN(aclnnInplaceTriu, [](Out self, int64_t diagonal) { self = at::triu(self.tensor, diagonal); });
ACLNN(aclnnConstantPadNd, [](In self, Ints pad, Num value, Out out) { out = at::constant_pad_nd(self, pad, value); });
ACLNN(aclnnPermute, [](In self, Ints dims, Out out) { out = self.permute(dims); });
ACLNN(aclnnOneHot, [](In self, int depth, In on, In off, int64_t, Out out) {
    auto hot = at::one_hot(self.to(at::kLong), depth).to(at::kBool);
    out = at::where(hot, on.reshape({}), off.reshape({}));
});

// Random numbers: a CPU generator seeded by (seed, offset), so runs repeat; not the numbers of a real NPU.
static at::Generator generator(int64_t seed, int64_t offset) {
    return at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed) * 1000003 +
                                                    static_cast<uint64_t>(offset));
}
ACLNN(aclnnInplaceRandom, [](Out self, int64_t from, int64_t to, int64_t seed, int64_t offset) {
    self.tensor.random_(from, to, generator(seed, offset));
});
ACLNN(aclnnInplaceUniform, [](Out self, double from, double to, uint64_t seed, uint64_t offset) {
    self.tensor.uniform_(from, to, generator(seed, offset));
});
ACLNN(aclnnInplaceNormal, [](Out self, float mean, float deviation, int64_t seed, int64_t offset) {
    self.tensor.normal_(mean, deviation, generator(seed, offset));
});
ACLNN(aclnnRandperm, [](int64_t n, int64_t seed, int64_t offset, Out out) {
    out = at::randperm(n, generator(seed, offset), at::TensorOptions().dtype(at::kLong));
});
ACLNN(aclnnMultinomial, [](In self, int64_t samples, bool replacement, int64_t seed, int64_t offset, Out out) {
    out = at::multinomial(self, samples, replacement, generator(seed, offset));
});
