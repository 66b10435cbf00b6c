// SPDX-License-Identifier: Apache-2.0
// Elementwise operators.
#include "operator.h"

using at::Tensor;

ACLNN(aclnnInplaceCopy, [](Out self, In src) { self = src; });
ACLNN(aclnnCast, [](In self, aclDataType, Out out) { out = self; });
ACLNN(aclnnForeachCopy, [](Ins src, Outs dst) {
    for (size_t i = 0; i < src.size(); ++i) dst[i] = src[i];
});
ACLNN(aclnnForeachAddList, [](Ins self, Ins other, In alpha, Outs out) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = at::add(self[i], other[i], alpha.item());
});

#define UNARY(NAME, function)                                           \
    ACLNN(aclnn##NAME, [](In self, Out out) { out = function(self); }); \
    ACLNN(aclnnInplace##NAME, [](Out self) { self = function(self.tensor); })

UNARY(Abs, at::abs);
UNARY(Neg, at::neg);
UNARY(Exp, at::exp);
UNARY(Exp2, at::exp2);
UNARY(Expm1, at::expm1);
UNARY(Log, at::log);
UNARY(Log2, at::log2);
UNARY(Log10, at::log10);
UNARY(Log1p, at::log1p);
UNARY(Sqrt, at::sqrt);
UNARY(Rsqrt, at::rsqrt);
UNARY(Reciprocal, at::reciprocal);
UNARY(Sin, at::sin);
UNARY(Cos, at::cos);
UNARY(Tan, at::tan);
UNARY(Tanh, at::tanh);
UNARY(Erf, at::erf);
UNARY(Sigmoid, at::sigmoid);
UNARY(Relu, at::relu);
UNARY(Floor, at::floor);
UNARY(Ceil, at::ceil);
UNARY(Round, at::round);
UNARY(Trunc, at::trunc);
UNARY(Sign, at::sign);
UNARY(Frac, at::frac);
UNARY(LogicalNot, at::logical_not);
UNARY(BitwiseNot, at::bitwise_not);
ACLNN(aclnnSilu, [](In self, Out out) { out = at::silu(self); });
ACLNN(aclnnGelu, [](In self, Out out) { out = at::gelu(self); });
ACLNN(aclnnGeluV2, [](In self, int64_t approximate, Out out) { out = at::gelu(self, approximate ? "tanh" : "none"); });
ACLNN(aclnnIsFinite, [](In self, Out out) { out = at::isfinite(self); });
ACLNN(aclnnIsNegInf, [](In self, Out out) { out = at::isneginf(self); });
ACLNN(aclnnIsPosInf, [](In self, Out out) { out = at::isposinf(self); });
ACLNN(aclnnNanToNum, [](In self, float nan, float inf, float negative_inf, Out out) {
    out = at::nan_to_num(self, nan, inf, negative_inf);
});
ACLNN(aclnnSoftplus, [](In self, Num beta, Num threshold, Out out) { out = at::softplus(self, beta, threshold); });
ACLNN(aclnnLeakyRelu, [](In self, Num slope, Out out) { out = at::leaky_relu(self, slope); });

ACLNN(aclnnAdd, [](In self, In other, Num alpha, Out out) { out = at::add(self, other, alpha); });
ACLNN(aclnnAdds, [](In self, Num other, Num alpha, Out out) { out = at::add(self, other, alpha); });
ACLNN(aclnnInplaceAdd, [](Out self, In other, Num alpha) { self = at::add(self.tensor, other, alpha); });
ACLNN(aclnnInplaceAdds, [](Out self, Num other, Num alpha) { self = at::add(self.tensor, other, alpha); });
ACLNN(aclnnSub, [](In self, In other, Num alpha, Out out) { out = at::sub(self, other, alpha); });
ACLNN(aclnnSubs, [](In self, Num other, Num alpha, Out out) { out = at::sub(self, other, alpha); });
ACLNN(aclnnInplaceSub, [](Out self, In other, Num alpha) { self = at::sub(self.tensor, other, alpha); });
ACLNN(aclnnInplaceSubs, [](Out self, Num other, Num alpha) { self = at::sub(self.tensor, other, alpha); });
ACLNN(aclnnRsub, [](In self, In other, Num alpha, Out out) { out = at::rsub(self, other, alpha); });
ACLNN(aclnnRsubs, [](In self, Num other, Num alpha, Out out) { out = at::rsub(self, other, alpha); });

#define BINARY(NAME, function)                                                           \
    ACLNN(aclnn##NAME, [](In self, In other, Out out) { out = function(self, other); }); \
    ACLNN(aclnnInplace##NAME, [](Out self, In other) { self = function(self.tensor, other); })
#define BINARY_SCALAR(NAME, function)                                                     \
    ACLNN(aclnn##NAME, [](In self, Num other, Out out) { out = function(self, other); }); \
    ACLNN(aclnnInplace##NAME, [](Out self, Num other) { self = function(self.tensor, other); })

BINARY(Mul, at::mul);
BINARY_SCALAR(Muls, at::mul);
BINARY(Div, at::div);
BINARY_SCALAR(Divs, at::div);
BINARY(FloorDivide, at::floor_divide);
BINARY_SCALAR(FloorDivides, at::floor_divide);
BINARY(RemainderTensorTensor, at::remainder);
BINARY_SCALAR(RemainderTensorScalar, at::remainder);
ACLNN(aclnnRemainderScalarTensor, [](Num self, In other, Out out) { out = at::remainder(self, other); });
BINARY(FmodTensor, at::fmod);
BINARY_SCALAR(FmodScalar, at::fmod);
BINARY(EqTensor, at::eq);
BINARY_SCALAR(EqScalar, at::eq);
BINARY(NeTensor, at::ne);
BINARY_SCALAR(NeScalar, at::ne);
BINARY(GtTensor, at::gt);
BINARY_SCALAR(GtScalar, at::gt);
BINARY(GeTensor, at::ge);
BINARY_SCALAR(GeScalar, at::ge);
BINARY(LtTensor, at::lt);
BINARY_SCALAR(LtScalar, at::lt);
BINARY(LeTensor, at::le);
BINARY_SCALAR(LeScalar, at::le);
BINARY(LogicalAnd, at::logical_and);
BINARY(LogicalOr, at::logical_or);
BINARY(LogicalXor, at::logical_xor);
BINARY(BitwiseAndTensor, at::bitwise_and);
BINARY_SCALAR(BitwiseAndScalar, at::bitwise_and);
BINARY(BitwiseOrTensor, at::bitwise_or);
BINARY_SCALAR(BitwiseOrScalar, at::bitwise_or);
BINARY(BitwiseXorTensor, at::bitwise_xor);
BINARY_SCALAR(BitwiseXorScalar, at::bitwise_xor);
BINARY(Maximum, at::maximum);
BINARY(Minimum, at::minimum);
BINARY(PowTensorTensor, at::pow);
BINARY_SCALAR(PowTensorScalar, at::pow);
ACLNN(aclnnPowScalarTensor, [](Num self, In exponent, Out out) { out = at::pow(self, exponent); });

static std::optional<c10::string_view> rounding(int mode) {
    return mode == 0 ? std::nullopt : std::optional<c10::string_view>(mode == 1 ? "trunc" : "floor");
}
ACLNN(aclnnDivMod, [](In self, In other, int mode, Out out) { out = at::div(self, other, rounding(mode)); });
ACLNN(aclnnDivMods, [](In self, Num other, int mode, Out out) { out = at::div(self, other, rounding(mode)); });
ACLNN(aclnnInplaceDivMod, [](Out self, In other, int mode) { self = at::div(self.tensor, other, rounding(mode)); });
ACLNN(aclnnInplaceDivMods, [](Out self, Num other, int mode) { self = at::div(self.tensor, other, rounding(mode)); });

static std::optional<at::Scalar> maybe(const Num& value) {
    return value.given() ? std::optional<at::Scalar>(value) : std::nullopt;
}
static std::optional<Tensor> maybe(const In& value) {
    return value.given() ? std::optional<Tensor>(value) : std::nullopt;
}
ACLNN(aclnnClamp, [](In self, Num low, Num high, Out out) { out = at::clamp(self, maybe(low), maybe(high)); });
ACLNN(aclnnClampTensor, [](In self, In low, In high, Out out) { out = at::clamp(self, maybe(low), maybe(high)); });
ACLNN(aclnnClampMin, [](In self, Num low, Out out) { out = at::clamp_min(self, low); });
ACLNN(aclnnClampMax, [](In self, Num high, Out out) { out = at::clamp_max(self, high); });
ACLNN(aclnnClampMinTensor, [](In self, In low, Out out) { out = at::clamp_min(self, low); });
ACLNN(aclnnClampMaxTensor, [](In self, In high, Out out) { out = at::clamp_max(self, high); });
ACLNN(aclnnInplaceClampMax, [](Out self, Num high) { self = at::clamp_max(self.tensor, high); });
ACLNN(aclnnInplaceClampMinTensor, [](Out self, In low) { self = at::clamp_min(self.tensor, low); });
ACLNN(aclnnInplaceClampMaxTensor, [](Out self, In high) { self = at::clamp_max(self.tensor, high); });

ACLNN(aclnnSWhere,
      [](In condition, In self, In other, Out out) { out = at::where(condition.to(at::kBool), self, other); });
ACLNN(aclnnLerp, [](In self, In end, In weight, Out out) { out = at::lerp(self, end, weight); });
ACLNN(aclnnLerps, [](In self, In end, Num weight, Out out) { out = at::lerp(self, end, weight); });
ACLNN(aclnnAddcmul, [](In self, In a, In b, Num value, Out out) { out = at::addcmul(self, a, b, value); });
ACLNN(aclnnAddcdiv, [](In self, In a, In b, Num value, Out out) { out = at::addcdiv(self, a, b, value); });
ACLNN(aclnnIsClose, [](In self, In other, double rtol, double atol, bool equal_nan, Out out) {
    out = at::isclose(self, other, rtol, atol, equal_nan);
});
ACLNN(aclnnEqual, [](In self, In other, Out out) { out = at::scalar_tensor(at::equal(self, other), at::kBool); });
