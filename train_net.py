#!/usr/bin/env python
"""Train and evaluate models; see --help."""

from ovseg_d2.engine import default_argument_parser, launch, main, one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        launch(main, default_argument_parser().parse_args())
