"""One test for each of 35 bugs that others have had in leases, elections, watches and handoffs. See README.md."""
