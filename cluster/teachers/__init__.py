"""Teacher replicas as Ray actors, and the pool that shares the work among them."""
