"""Several servers, Envoy and a bucket, all of them real processes; `make fleet-test` runs these."""
