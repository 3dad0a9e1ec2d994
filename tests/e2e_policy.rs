//! Promise: in the lab, pods reach each other as the Kubernetes API says that
//! NetworkPolicies let them, in every mode; a denial is a silence, and stays one.

mod e2e_support;
mod policy_support {
    pub mod matrix;
}

use std::time::Duration;

use e2e_support::{Lab, lab, missing, skip};
use policy_support::matrix::{Case, Matrix, clear, settled};

async fn large(letter: &str) -> Lab {
    lab(letter, 2, |config| {
        for node in &mut config.nodes {
            node.instance_type = "ecs.g7.4xlarge".to_owned();
        }
    })
    .await
}

/// Every case of the table, one after the other.
async fn every_case(lab: &Lab, exclusive: bool) {
    let matrix = Matrix::up(lab, exclusive).await;
    let mut wrong = Vec::new();
    for case in Case::all() {
        matrix.apply(lab, &case);
        settled(lab, case.policies.len()).await;
        // The news has reached both nodes; what pods' addresses mean may take a moment
        // after the first pods are up. Then twice: a denial stays one.
        let began = std::time::Instant::now();
        let mut differences = matrix.differences(&case).await;
        while !differences.is_empty() && began.elapsed() < Duration::from_secs(8) {
            differences = matrix.differences(&case).await;
        }
        if differences.is_empty() {
            differences = matrix.differences(&case).await;
        }
        if !differences.is_empty() {
            differences.truncate(12);
            wrong.push(format!("{}:\n  {}", case.case, differences.join("\n  ")));
        }
    }
    clear(lab);
    assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), lab.last_words());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_of_the_documentation_holds_for_pods_that_share_enis() {
    if let Some(missing) = missing() {
        return skip("every_case_of_the_documentation_holds_for_pods_that_share_enis", missing);
    }
    let lab = large("pv").await;
    every_case(&lab, false).await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_of_the_documentation_holds_for_pods_with_enis_of_their_own() {
    if let Some(missing) = missing() {
        return skip("every_case_of_the_documentation_holds_for_pods_with_enis_of_their_own", missing);
    }
    let lab = large("px").await;
    every_case(&lab, true).await;
    lab.down().await;
}
