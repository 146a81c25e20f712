"""The systems of the papers, and what of the package each is built of."""

from __future__ import annotations

import re
from typing import NamedTuple


class System(NamedTuple):
    """A paper that the package serves."""

    title: str
    year: int
    modules: tuple[str, ...] = ()  # of the catalogue
    functions: tuple[str, ...] = ()  # public names of `fused_losses`, `metrics.` or `margins.`
    recipe: str = ""  # a heading of docs/recipes.md


def _row(line: str) -> System:
    title, year, modules, functions, recipe = (cell.strip() for cell in line.split("|"))
    return System(title, int(year), _names(modules), _names(functions), recipe)


def _names(cell: str) -> tuple[str, ...]:
    return tuple(re.split(r",\s*", cell)) if cell else ()


# title | year | modules | functions | recipe
SYSTEMS = tuple(
    _row(line)
    for line in """
FaceNet: A Unified Embedding for Face Recognition and Clustering | 2015 | BatchSemiHardTripletLoss, FaceNetTripletLoss | all_triplets, mine_triplets |
Learning Embeddings with Centroid Triplet Loss for Object Identification in Robotic Grasping | 2024 | CentroidTripletLoss, BatchHardTripletLoss, CenterLoss | | Centroid triplets with their classifier
SuSana Distancia is all you need: Enforcing class separability in metric learning | 2023 | PrototypeTripletLoss, ICNNLoss | |
Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition | 2022 | UNPGLoss | unpg_margin_softmax |
CAFA: Class-Aware Feature Alignment for Test-Time Adaptation | 2022 | ClassAwareFeatureAlignmentLoss | pairwise_distance |
Adaptive Multi-head Contrastive Learning | 2023 | AMCLLoss | |
ElasticFace: Elastic Margin Loss for Deep Face Recognition | 2021 | ElasticFaceLoss | margins.ElasticArcFace, margins.ElasticCosFace |
SymFace: Additional Facial Symmetry Loss for Deep Face Recognition | 2024 | SymFaceLoss | | A face loss with a symmetric half
SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition | 2022 | SFaceLoss | |
Coarse-to-Fine: Learning Compact Discriminative Representation for Single-Stage Image Retrieval | 2023 | MadaCosLoss | adaptive_margin_softmax | Nearest classes as hard negatives
Hyperspherical embedding for novel class classification | 2021 | NormalizedSoftmaxLoss | margin_softmax |
Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning | 2019 | MultiSimilarityLoss | multi_similarity |
Understanding the Behaviour of Contrastive Loss | 2020 | InfoNCELoss, HardContrastiveLoss | info_nce, uniformity |
Multi-label Cluster Discrimination for Visual Representation Learning | 2024 | MLCDLoss | ClassCenters |
The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family | 2016 | ZLoss | SphericalHead |
Label Distributionally Robust Losses for Multi-class Classification | 2021 | LDRLoss, ALDRLoss, CrammerSingerLoss, WestonWatkinsLoss | |
Cross-Entropy Loss Functions: Theoretical Analysis and Applications | 2023 | CompSumLoss, GCELoss, AGCELoss, AULLoss, NCELoss, SCELoss, MAELoss, MSELoss | |
Orthogonal Projection Loss | 2021 | OrthogonalProjectionLoss | orthogonal_projection |
It Takes Two to Tango: Mixup for Deep Metric Learning | 2021 | MetrixLoss | WeightedPairs | Mixed examples
Improving Knowledge Distillation via Regularizing Feature Norm and Direction | 2023 | NDLoss, KDLoss | |
Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head | 2024 | DHKDLoss | distillation |
One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation | 2023 | OFALoss | distillation |
Self-Knowledge Distillation with Progressive Refinement of Targets | 2020 | PSKDLoss | distillation |
Multi-aspect Knowledge Distillation with Large Language Model | 2025 | MultiAspectKDLoss | |
Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model Replacements | 2024 | HOCLoss, DSimplexLoss | higher_order_compatibility, DSimplexHead |
Backward-Compatible Aligned Representations via an Orthogonal Transformation Layer | 2024 | OCALoss | | An old gallery that stays comparable
How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation | 2023 | | trilinear_attention |
MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings | 2024 | | muvera_encode, maxsim, pairwise_topk |
LeanVec: Search your vectors faster by making them fit | 2023 | | leanvec, pairwise_topk | Few coordinates first, then whole products
Yes, we CANN: Constrained Approximate Nearest Neighbors for local feature-based visual localization | 2023 | | maxsim | Feature by feature search
Efficient Nearest Neighbor Search for Cross-Encoder Models using Matrix Factorization | 2022 | | pairwise_topk | Cross-encoder scores by a factored matrix
AdaNPC: Exploring Non-Parametric Classifier for Test-Time Adaptation | 2023 | | metrics.knn_classify, radius_search |
Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration | 2023 | | similarity_attention | Prototypes of new classes
Cauchy-Schwarz Divergence Information Bottleneck for Regression | 2024 | CSQMILoss, CauchySchwarzDivergenceLoss | cauchy_schwarz_qmi, cauchy_schwarz_divergence |
ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer | 2023 | | binary_codes, hamming_topk |
Adversarial Attacks against Closed-Source MLLMs via Feature Optimal Alignment | 2025 | FeatureOptimalAlignmentLoss | sinkhorn, kmeans |
UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning | 2025 | UniMEKLLoss | |
Google Landmarks Dataset v2: A Large-Scale Benchmark for Instance-Level Recognition and Retrieval | 2020 | | metrics.map_at_k, metrics.gap |
Bias Loss for Mobile Neural Networks | 2021 | BiasLoss | |
DatasetEquity: Are All Samples Created Equal? In The Quest For Equity Within Datasets | 2023 | DatasetEquityLoss | |
EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification | 2024 | | | A random loss for a binary classifier
Dataset Condensation with Contrastive Signals | 2022 | DCCLoss | |
SMILe: Leveraging Submodular Mutual Information For Robust Few-Shot Object Detection | 2024 | | logsumexp_similarity, pairwise_topk | Submodular terms of a support set
Revisiting Discriminative vs. Generative Classifiers: Theory and Implications | 2023 | GaussianNaiveBayesLoss | pairwise_distance |
When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method | 2022 | | pairwise_distance, info_nce | Distances to class Gaussians, filtered
Rethinking Positive Pairs in Contrastive Learning | 2024 | HydraLoss | |
Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning | 2024 | MCLLoss | info_nce |
Deep Clustering via Joint Convolutional Autoencoder Embedding and Relative Entropy Minimization | 2017 | DEPICTLoss | |
SF(DA)^2: Source-free Domain Adaptation Through the Lens of Data Augmentation | 2024 | AaDLoss | |
Solving the Catastrophic Forgetting Problem in Generalized Category Discovery | 2024 | SupConLoss | supervised_contrastive, distillation | New categories beside old ones
BioD2C: A Dual-level Semantic Consistency Constraint Framework for Biomedical VQA | 2025 | FeatureQueueKDLoss | distillation |
DiffusionRet: Generative Text-Video Retrieval with Diffusion Model | 2023 | InfoNCELoss | info_nce | Text and video, both ways
Transductive Few-Shot Learning: Clustering is All You Need? | 2021 | | kmeans, segment_mean | Few shots by clustering
Unsupervised Manifold Linearizing and Clustering | 2023 | CodingRateLoss | sinkhorn |
Attention-based Dynamic Subspace Learners for Medical Image Analysis | 2022 | MarginLoss | margin_loss, contrastive | Slices of an embedding
Visual Classification via Description from Large Language Models | 2022 | | pairwise_topk, segment_mean | Classes by their descriptions
Vocabulary-free Image Classification | 2023 | | metrics.knn_classify, pairwise_topk | Names without a vocabulary
A Tale of Two Features: Stable Diffusion Complements DINO for Zero-Shot Semantic Correspondence | 2023 | | pairwise_topk | Points of one picture in another
CNN Features off-the-shelf: an Astounding Baseline for Recognition | 2014 | | maxsim, pairwise_distance | Features off the shelf
Towards Content-based Pixel Retrieval in Revisited Oxford and Paris | 2023 | | metrics.revisited_map |
GeneCIS: A Benchmark for General Conditional Image Similarity | 2023 | | metrics.recall_at_k |
DisWOT: Student Architecture Search for Distillation WithOut Training | 2023 | SimilarityPreservingLoss, CCLoss | |
Class-relation Knowledge Distillation for Novel Class Discovery | 2023 | KDLoss | distillation | Relations between known and new classes
LVM-Med: Learning Large-Scale Self-Supervised Vision Models for Medical Imaging via Second-order Graph Matching | 2023 | | pairwise_similarity | Affinities for a graph matching
EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies | 2023 | | | The hardest features of a picture
ScatSimCLR: self-supervised contrastive learning with pretext task regularization for small-scale datasets | 2021 | NTXentLoss | nt_xent |
Relevance Filtering for Embedding-based Retrieval | 2024 | | pairwise_topk | A score's cut
CriSp: Leveraging Tread Depth Maps for Enhanced Crime-Scene Shoeprint Matching | 2024 | CriSpLoss | |
Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models | 2024 | InfoNCELoss | info_nce | Forgetting without labels
Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual Prompt Tuning | 2023 | | margin_softmax | A blurred task boundary
Wide and Deep Neural Networks Achieve Optimality for Classification | 2022 | | similarity_attention |
Dynamic Y-KD: A Hybrid Approach to Continual Instance Segmentation | 2023 | KDLoss | distillation | Instances that came before
Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing | 2021 | CKALoss, KDLoss, InfoNCELoss | | Layers of two models
""".strip().splitlines()  # noqa: E501
)
