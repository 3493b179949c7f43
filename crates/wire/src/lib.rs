//! Sites talking: HTTPS with client certificates, invites, resumable uploads
