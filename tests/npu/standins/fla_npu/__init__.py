# SPDX-License-Identifier: Apache-2.0
"""Stand-in for fla_npu (operators of linear attention for NPUs), which vllm-ascend 0.30.0rc2 imports in every worker.
Models with linear attention are not served here: every operator raises an error."""
