# SPDX-License-Identifier: Apache-2.0
from .app import main

main()
