# SPDX-License-Identifier: Apache-2.0
"""The first station: tokens per slot, counted on the device and taken to the host."""
