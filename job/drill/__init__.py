"""Local stand-ins for the cloud: an S3 server, a network that fails on demand, a spot notice.

The preemption drill and the tests run the real program against them; training never imports them.
"""
