//! Packages on this worker: the folders that they are installed in, the jobs that install them, and what
//! npm and pip are told to do.

pub mod managers;
