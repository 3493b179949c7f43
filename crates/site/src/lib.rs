//! One running site: catalog, scheduler, jobs, API
