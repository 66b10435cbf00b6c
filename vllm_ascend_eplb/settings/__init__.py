# SPDX-License-Identifier: Apache-2.0
"""The schema of the settings, their errors, and the check that they fit a model and a server."""
