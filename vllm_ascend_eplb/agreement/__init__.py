# SPDX-License-Identifier: Apache-2.0
"""Agreement: every rank learns the same facts at the same step."""
