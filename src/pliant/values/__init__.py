"""Zero or round the values of weights, and pack them: nothing here changes a shape."""
