# SPDX-License-Identifier: Apache-2.0
"""What the package reads from and writes to disks."""
