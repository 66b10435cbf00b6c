// SPDX-License-Identifier: Apache-2.0
// Reductions, scans and sorting.
#include "operator.h"

using emulated::scalar_type;

ACLNN(aclnnReduceSum, [](In self, Ints dims, bool keep, aclDataType type, Out out) {
    out = dims.empty() ? at::sum(self, scalar_type(type)).reshape(out.tensor.sizes())
                       : at::sum(self, dims, keep, scalar_type(type));
});
ACLNN(aclnnMean, [](In self, Ints dims, bool keep, aclDataType type, Out out) {
    out = dims.empty() ? at::mean(self, scalar_type(type)).reshape(out.tensor.sizes())
                       : at::mean(self, dims, keep, scalar_type(type));
});
ACLNN(aclnnProd, [](In self, aclDataType type, Out out) { out = at::prod(self, scalar_type(type)); });
ACLNN(aclnnProdDim, [](In self, int64_t dim, bool keep, aclDataType type, Out out) {
    out = at::prod(self, dim, keep, scalar_type(type));
});
ACLNN(aclnnMax, [](In self, Out out) { out = at::max(self); });
ACLNN(aclnnMin, [](In self, Out out) { out = at::min(self); });
ACLNN(aclnnMaxDim, [](In self, int64_t dim, bool keep, Out values, Out indices) {
    auto [v, i] = at::max(self, dim, keep);
    values = v;
    indices = i;
});
ACLNN(aclnnMinDim, [](In self, int64_t dim, bool keep, Out values, Out indices) {
    auto [v, i] = at::min(self, dim, keep);
    values = v;
    indices = i;
});
ACLNN(aclnnAmax, [](In self, Ints dims, bool keep, Out out) { out = at::amax(self, dims, keep); });
ACLNN(aclnnAmin, [](In self, Ints dims, bool keep, Out out) { out = at::amin(self, dims, keep); });
ACLNN(aclnnArgMax, [](In self, int64_t dim, bool keep, Out out) { out = at::argmax(self, dim, keep); });
ACLNN(aclnnArgMin, [](In self, int64_t dim, bool keep, Out out) { out = at::argmin(self, dim, keep); });
ACLNN(aclnnAll, [](In self, Ints dims, bool keep, Out out) {
    auto value = self.to(at::kBool);
    out = dims.empty() ? at::all(value).reshape(out.tensor.sizes()) : at::all(value, at::IntArrayRef(dims), keep);
});
ACLNN(aclnnAny, [](In self, Ints dims, bool keep, Out out) {
    auto value = self.to(at::kBool);
    out = dims.empty() ? at::any(value).reshape(out.tensor.sizes()) : at::any(value, at::IntArrayRef(dims), keep);
});
ACLNN(aclnnCumsum,
      [](In self, int64_t dim, aclDataType type, Out out) { out = at::cumsum(self, dim, scalar_type(type)); });
ACLNN(aclnnSort, [](In self, bool stable, int64_t dim, bool descending, Out values, Out indices) {
    auto [v, i] = at::sort(self, stable, dim, descending);
    values = v;
    indices = i;
});
ACLNN(aclnnArgsort, [](In self, int64_t dim, bool descending, Out out) { out = at::argsort(self, dim, descending); });
ACLNN(aclnnTopk, [](In self, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices) {
    auto [v, i] = at::topk(self, k, dim, largest, sorted);
    values = v;
    indices = i;
});
ACLNN(aclnnVarCorrection, [](In self, Ints dims, int64_t correction, bool keep, Out out) {
    out = at::var(self, at::OptionalIntArrayRef(dims), correction, keep);
});
ACLNN(aclnnStd, [](In self, Ints dims, int64_t correction, bool keep, Out out) {
    out = at::std(self, at::OptionalIntArrayRef(dims), correction, keep);
});
ACLNN(aclnnLinalgVectorNorm, [](In self, Num order, Ints dims, bool keep, aclDataType, Out out) {
    out = at::linalg_vector_norm(self, order, dims.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims),
                                 keep);
});
ACLNN(aclnnLogSumExp, [](In self, Ints dims, bool keep, Out out) { out = at::logsumexp(self, dims, keep); });
ACLNN(aclnnHistc,
      [](In self, int64_t bins, Num low, Num high, Out out) { out = at::histc(self.to(at::kFloat), bins, low, high); });
ACLNN(aclnnBincount, [](In self, In weights, int64_t minlength, Out out) {
    out = at::bincount(self.to(at::kLong), weights.given() ? std::optional<at::Tensor>(weights) : std::nullopt,
                       std::max(minlength, out.tensor.numel()));
});
ACLNN(aclnnUnique2, [](In self, bool sorted, bool inverse, bool counts, Out values, Out back, Out count) {
    auto [v, i, c] = at::_unique2(self, sorted, inverse, counts);
    values.resize(v);
    if (inverse) back = i.reshape(back.tensor.sizes());
    if (counts) count.resize(c);
});
