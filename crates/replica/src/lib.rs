//! The store of chains: receive, apply, compact, pin, hold
