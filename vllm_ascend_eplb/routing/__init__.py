# SPDX-License-Identifier: Apache-2.0
"""The maps and dispatch tables that the routers read."""
