//! The NBD protocol: a pure codec, a client and a server
