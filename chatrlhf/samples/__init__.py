"""The embedded sample task: a small town's visitors' desk with a known answer to every request."""
