"""Running weights: requests, scheduler, paged key-value cache, sampling."""
