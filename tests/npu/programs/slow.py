# SPDX-License-Identifier: Apache-2.0
"""A slow planner. It has its own module, because the planner's process imports no torch."""

import time

from vllm_ascend_eplb.planning.request import PlanRequest, plan_request
from vllm_ascend_eplb.values.plan import Plan

SECONDS = 2.0


def plan(request: PlanRequest) -> Plan:
    time.sleep(SECONDS)
    return plan_request(request)
