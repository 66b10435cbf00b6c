// SPDX-License-Identifier: Apache-2.0
// Gathering, scattering and selecting.
#include "operator.h"

using at::Tensor;

namespace {

Tensor long_index(const Tensor& index) { return index.to(at::kLong); }

c10::List<std::optional<Tensor>> indices_of(const Ins& tensors) {
    c10::List<std::optional<Tensor>> indices;
    for (const Tensor& tensor : tensors) {
        // torch_npu passes "every element" as an empty tensor with a dimension of size 0 or as none at all.
        const bool all = !tensor.defined() || (tensor.numel() == 0 && tensor.dim() == 1 && tensors.size() > 1);
        indices.push_back(
            all ? std::nullopt
                : std::optional<Tensor>(tensor.scalar_type() == at::kInt ? tensor.to(at::kLong) : tensor));
    }
    return indices;
}

void scatter_into(Tensor& self, int64_t dim, const Tensor& index, const Tensor& src, int64_t reduction) {
    if (reduction == 1) {
        self.scatter_add_(dim, long_index(index), src);
    } else if (reduction == 2) {
        self.scatter_(dim, long_index(index), src, "multiply");
    } else {
        self.scatter_(dim, long_index(index), src);
    }
}

}  // namespace

ACLNN(aclnnIndex, [](In self, Ins indices, Out out) { out = at::index(self, indices_of(indices)); });
ACLNN(aclnnIndexPutImpl, [](Out self, Ins indices, In values, bool accumulate, bool) {
    at::index_put_(self.tensor, indices_of(indices), values.to(self.tensor.scalar_type()), accumulate);
});
ACLNN(aclnnIndexSelect, [](In self, int64_t dim, In index, Out out) { out = at::index_select(self, dim, index); });
ACLNN(aclnnIndexAdd, [](In self, int64_t dim, In index, In source, Num alpha, Out out) {
    out = at::index_add(self, dim, index, source, alpha);
});
ACLNN(aclnnIndexCopy, [](In self, int64_t dim, In index, In source, Out out) {
    out = at::index_copy(self, dim, long_index(index), source);
});
ACLNN(aclnnInplaceIndexCopy,
      [](Out self, int64_t dim, In index, In source) { self.tensor.index_copy_(dim, long_index(index), source); });
// The index of index_fill is an array here, the value a scalar or a tensor.
ACLNN(aclnnInplaceIndexFill,
      [](Out self, int64_t dim, In index, Num value) { self.tensor.index_fill_(dim, long_index(index), value); });
ACLNN(aclnnGather, [](In self, int64_t dim, In index, Out out) { out = at::gather(self, dim, long_index(index)); });
ACLNN(aclnnScatter, [](In self, int64_t dim, In index, In src, int64_t reduction, Out out) {
    Tensor result = self.clone();
    scatter_into(result, dim, index, src, reduction);
    out = result;
});
ACLNN(aclnnInplaceScatter, [](Out self, int64_t dim, In index, In src, int64_t reduction) {
    scatter_into(self.tensor, dim, index, src, reduction);
});
ACLNN(aclnnScatterValue, [](In self, int64_t dim, In index, Num value, int64_t reduction, Out out) {
    Tensor result = self.clone();
    scatter_into(result, dim, index, at::full(index.sizes(), value, self.options()), reduction);
    out = result;
});
ACLNN(aclnnInplaceScatterValue, [](Out self, int64_t dim, In index, Num value, int64_t reduction) {
    scatter_into(self.tensor, dim, index, at::full(index.sizes(), value, self.tensor.options()), reduction);
});
ACLNN(aclnnScatterAdd, [](In self, int64_t dim, In index, In src, Out out) {
    out = at::scatter_add(self, dim, long_index(index), src);
});
ACLNN(aclnnScatterNdUpdate, [](Out self, In indices, In updates) {
    c10::List<std::optional<Tensor>> where;
    for (const Tensor& column : long_index(indices).unbind(-1)) where.push_back(std::optional<Tensor>(column));
    at::index_put_(self.tensor, where, updates);
});
ACLNN(aclnnNonzeroV2, [](In self, Out out) { out.resize(at::nonzero(self).t().contiguous()); });
ACLNN(aclnnNonzero, [](In self, Out out) { out.resize(at::nonzero(self)); });
ACLNN(aclnnMaskedSelect, [](In self, In mask, Out out) { out.resize(at::masked_select(self, mask)); });
ACLNN(aclnnInplaceMaskedFillScalar, [](Out self, In mask, Num value) { self.tensor.masked_fill_(mask, value); });
ACLNN(aclnnInplaceMaskedFillTensor,
      [](Out self, In mask, In value) { self.tensor.masked_fill_(mask, value.reshape({})); });
ACLNN(aclnnInplaceMaskedScatter, [](Out self, In mask, In source) { self.tensor.masked_scatter_(mask, source); });
ACLNN(aclnnEmbedding, [](In weight, In indices, Out out) { out = at::embedding(weight, long_index(indices)); });
ACLNN(aclnnIsInTensorScalar,
      [](In elements, Num test, bool, bool invert, Out out) { out = at::isin(elements, test, false, invert); });
static void search(const In& sorted, const Tensor& self, bool as_int32, bool right, const In& sorter, Out& out) {
    out = at::searchsorted(sorted, self, as_int32, right, std::nullopt,
                           sorter.given() ? std::optional<Tensor>(sorter) : std::nullopt);
}
ACLNN(aclnnSearchSorted, [](In sorted, In self, bool as_int32, bool right, In sorter, Out out) {
    search(sorted, self, as_int32, right, sorter, out);
});
ACLNN(aclnnSearchSorteds, [](In sorted, Num self, bool as_int32, bool right, In sorter, Out out) {
    search(sorted, at::scalar_tensor(self, sorted.options()), as_int32, right, sorter, out);
});
