# SPDX-License-Identifier: Apache-2.0
"""A planner that takes its time; a module of its own, because the planner's process imports no torch."""

import time

from vllm_ascend_eplb.plans import Plan
from vllm_ascend_eplb.process import PlanRequest, plan_request

SECONDS = 2.0


def plan(request: PlanRequest) -> Plan:
    time.sleep(SECONDS)
    return plan_request(request)
