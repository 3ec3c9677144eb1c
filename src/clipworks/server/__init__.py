"""Search, classification, masks and defects of one collection as a service with a page: `clipworks serve`."""
