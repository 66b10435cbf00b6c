# SPDX-License-Identifier: Apache-2.0
"""The fifth station: the maps and dispatch tables that the routers read."""
