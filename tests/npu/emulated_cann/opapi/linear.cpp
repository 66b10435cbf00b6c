// SPDX-License-Identifier: Apache-2.0
// Matrix products, normalisation, activation.
#include "operator.h"

using at::Tensor;

ACLNN(aclnnMatmul, [](In self, In other, Out out, int8_t) { out = at::matmul(self, other); });
ACLNN(aclnnMm, [](In self, In other, Out out, int8_t) { out = at::mm(self, other); });
ACLNN(aclnnMv, [](In self, In vector, Out out, int8_t) { out = at::mv(self, vector); });
ACLNN(aclnnDot, [](In self, In other, Out out) { out = at::dot(self, other); });
ACLNN(aclnnBatchMatMul, [](In self, In other, Out out, int8_t) { out = at::bmm(self, other); });
ACLNN(aclnnAddmm,
      [](In self, In a, In b, Num beta, Num alpha, Out out, int8_t) { out = at::addmm(self, a, b, beta, alpha); });
ACLNN(aclnnInplaceAddmm,
      [](Out self, In a, In b, Num beta, Num alpha, int8_t) { self = at::addmm(self.tensor, a, b, beta, alpha); });
ACLNN(aclnnBaddbmm,
      [](In self, In a, In b, Num beta, Num alpha, Out out, int8_t) { out = at::baddbmm(self, a, b, beta, alpha); });
ACLNN(aclnnSoftmax, [](In self, int64_t dim, Out out) { out = at::softmax(self, dim, out.tensor.scalar_type()); });
ACLNN(aclnnLogSoftmax,
      [](In self, int64_t dim, Out out) { out = at::log_softmax(self, dim, out.tensor.scalar_type()); });
ACLNN(aclnnLayerNorm, [](In input, Ints shape, In weight, In bias, double epsilon, Out out, Out mean, Out deviation) {
    auto [y, m, r] = at::native_layer_norm(input, shape, weight.given() ? std::optional<Tensor>(weight) : std::nullopt,
                                           bias.given() ? std::optional<Tensor>(bias) : std::nullopt, epsilon);
    out = y;
    if (mean.given()) mean = m;
    if (deviation.given()) deviation = r;
});
