# SPDX-License-Identifier: Apache-2.0
"""Tokens per slot, counted on the device and copied to the host."""
