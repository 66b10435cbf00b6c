// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.h"

namespace eplb {

Tensor map_and_record_cuda(const Arguments& given);

}  // namespace eplb
