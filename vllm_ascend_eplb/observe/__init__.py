# SPDX-License-Identifier: Apache-2.0
"""Statistics of the balancer, their file, and metrics."""
